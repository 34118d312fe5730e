"""The learned reward model of stage `reward` as a reward function."""

from typing import Any

from threefold.models import chat
from threefold.models.ensemble import Ensemble
from threefold.rewards.composition import RewardFunction
from threefold.rewards.messages import messages_of, text_of


def learned(model: Ensemble, tokenizer: Any, batch_size: int = 128) -> RewardFunction:
    """The normalised score of a reward model or ensemble, which reads prompt and completion up to the end token.

    Normalised: mean 0 and standard deviation 1 on the SFT model's samples. The columns `prompt_ids` (up to the mark
    that opens the reply) and `completion_ids` (with the end token, if the reply has one) are scored as they are, all
    end tokens alike; what is not given is rendered with the chat template. A prompt that is a text is one user's
    message. `batch_size`: rows per forward pass.
    """

    def reward(
        prompts: list[Any], completions: list[Any], prompt_ids: list[list[int]] | None = None,
        completion_ids: list[list[int]] | None = None, **columns: Any,
    ) -> list[float | None]:  # fmt: skip
        asked = prompt_ids or [chat.prompt_ids(tokenizer, messages_of(prompt, "user")) for prompt in prompts]
        replied = completion_ids or [
            chat.reply_ids(tokenizer, messages_of(prompt, "user"), text_of(text))
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        ended = [chat.with_own_end(tokenizer, reply) for reply in replied]
        sequences = [prompt + reply for prompt, reply in zip(asked, ended, strict=True)]
        return model.scores(sequences, tokenizer.pad_token_id, batch_size).tolist()

    return reward

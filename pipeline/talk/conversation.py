"""A conversation with a player: the turns so far, the models that reply, and the next reply."""

from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from threefold.columns import Message
from threefold.errors import UserError
from threefold.evaluation import measuring
from threefold.evaluation.players import MODELS, Player
from threefold.execution import device
from threefold.models import chat, ensemble, loading
from threefold.rewards.learned import learned


class Speaker:
    """A player with its models; `folders` are those of the stages that it needs.

    Raises `UserError` where tokenizer or template of two of them differ.
    """

    def __init__(self, player: Player, folders: dict[str, Path], config: DictConfig):
        self.player, self.sampling = player, config.sampling
        self.tokenizer = chat.require_same_template(folders)
        place = device.set_up(config.runtime, config.precision).type
        self.policy = loading.load_policy(folders[MODELS[player.model]], place)
        self.reward_model: Any = None
        if player.decoding == "best_of":
            self.reward_model = learned(ensemble.load(folders["reward"], place), self.tokenizer)

    def tokens_over(self, messages: list[Message]) -> int:
        """By how many tokens the messages leave too little room for a reply; 0 or less is enough room."""
        room = loading.context_length(self.policy.config) - self.sampling.max_new_tokens
        return len(chat.prompt_ids(self.tokenizer, messages)) - room

    def reply(self, messages: list[Message], seed: int) -> str:
        """The reply to the messages, the same for the same seed."""
        ids = [chat.prompt_ids(self.tokenizer, messages)]
        count = self.player.count
        sampled = measuring.samples(self.policy, ids, count, self.sampling, self.tokenizer, seed)
        [texts] = both = measuring.texts_of(self.tokenizer, sampled)
        scores = None
        if self.reward_model is not None:
            [scores] = measuring.proxy_scores(self.reward_model, [messages], ids, sampled, both)
        return texts[measuring.chosen_sample(self.player, texts, scores)]


class Conversation:
    """The turns so far; `forgotten` counts the messages that were dropped to make room for others."""

    def __init__(self, speaker: Speaker, system: str | None, seed: int):
        self.speaker, self.system, self.seed = speaker, system, seed
        self.turns: list[Message] = []
        self.forgotten = self.given = 0

    def reply(self, text: str) -> str:
        """The reply to what the user says next; both become part of the conversation.

        Where there is no room for a reply, the oldest turns are dropped, the system message never. Raises `UserError`
        when `text` alone leaves no room.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        while (over := self.speaker.tokens_over(self._with_system(turns))) > 0:
            if len(turns) == 1:
                raise UserError(f"this message is {over:,} tokens too long to leave room for a reply; say it shorter")
            turns = turns[2:]
        self.forgotten += len(self.turns) + 1 - len(turns)
        self.given += 1  # each reply has numbers of its own, which are not those of another one under another seed
        seed = int(np.random.SeedSequence((self.seed, self.given)).generate_state(1)[0])
        reply = self.speaker.reply(self._with_system(turns), seed)
        self.turns = [*turns, {"role": "assistant", "content": reply}]
        return reply

    def _with_system(self, turns: list[Message]) -> list[Message]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + turns

"""`threefold template`: one conversation as a chat template writes it, with what a model is given and trained on."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threefold.columns import Message
from threefold.config.compose import compose
from threefold.errors import UserError
from threefold.models import chat, template
from threefold.stages import tokenizer as tokenizer_stage

SYSTEM: Message = {"role": "system", "content": "Be brief."}
QUESTIONS = ("What is 2 + 2?", "And 3 + 3?")
REPLIES = ("It is 4.", "That is 6.")
SHOWN = 12  # marks of turns
THOUGHT = "<think>\nI add them.\n</think>\n\n"


@dataclass(frozen=True)
class Row:
    """One reply with its prompt, as all stages train on it."""

    turn: template.Turn
    prompt_ids: list[int]
    reply_ids: list[int]


@dataclass(frozen=True)
class Examination:
    """What a tokenizer's chat template makes of two questions with their replies."""

    rows: list[Row]
    system: bool  # whether it takes a system message
    thinking: bool  # whether it takes only replies that begin with a thinking block
    history: str  # the first reply within the prompt of the second one, with what stands around it
    keeps_prefix: bool  # whether the conversation up to the first reply begins the one that goes on
    bos: int  # how many BOS a prompt has
    decodes: bool  # whether all tokens are decoded to what the template writes
    seamless: bool  # whether prompt and reply, tokenised as one text, are the tokens of both
    refused: dict[str, str]  # shapes of conversations, and why


def examine(tokenizer: Any) -> Examination:
    """Render, tokenise and compare. Raises `UserError` where nothing can be trained on."""
    if problem := template.problem(tokenizer):
        raise UserError(problem)
    refused = template.refusals(tokenizer)
    system = [] if "a system message" in refused else [SYSTEM]
    first = [*system, {"role": "user", "content": QUESTIONS[0]}]
    thinking = chat.refusal(tokenizer, first, REPLIES[0]) is not None
    replies = [THOUGHT * thinking + reply for reply in REPLIES]
    both = [*first, {"role": "assistant", "content": replies[0]}, {"role": "user", "content": QUESTIONS[1]}]
    rows = [_row(tokenizer, prompt, reply) for prompt, reply in zip((first, both), replies, strict=True)]
    later = rows[1].turn.prompt
    once = template.render(tokenizer, both[:-1], False)
    whole = [row.turn.prompt + row.turn.completion for row in rows]
    tokens = [row.prompt_ids + row.reply_ids for row in rows]
    return Examination(
        rows,
        bool(system),
        thinking,
        later[later.rindex(QUESTIONS[0]) + len(QUESTIONS[0]) : later.rindex(QUESTIONS[1])],
        later.startswith(once),
        max(row.prompt_ids.count(tokenizer.bos_token_id) for row in rows),
        [tokenizer.decode(ids) for ids in tokens] == whole,
        [tokenizer.encode(text, add_special_tokens=False) for text in whole] == tokens,
        refused,
    )


def _row(tokenizer: Any, prompt: list[Message], reply: str) -> Row:
    end = str(template.end_of_turn(tokenizer))
    [turn], _ = template.turns(tokenizer, prompt, [reply], end)
    prompt_ids, [reply_ids] = chat.row_ids(tokenizer, prompt, reply)
    return Row(turn, prompt_ids, reply_ids)


def report(tokenizer: Any) -> list[str]:
    """Lines that tell a person what stages do with the tokenizer's chat template."""
    seen, yes = examine(tokenizer), {True: "yes", False: "no"}
    lines = ["What a model is given, and [[what it says itself, and is trained on]]; nothing after that is trained on."]
    for number, row in enumerate(seen.rows, start=1):
        lines += ["", f"--- reply {number}", f"{row.turn.prompt}[[{row.turn.completion}]]{row.turn.tail}"]
    marks = [token for token in template.turn_marks(tokenizer) if not re.search(r"reserved|unused", token)]
    ends = tokenizer.convert_ids_to_tokens(chat.end_ids(tokenizer))
    taken = "with and without" if _takes_thinking(tokenizer) else "without"
    facts = {
        "end token": f"{ends[0]} is trained; sampling ends at {', '.join(ends)}; pad token {tokenizer.pad_token}",
        "BOS in a prompt": str(seen.bos) if tokenizer.bos_token else "0: the tokenizer has none",
        "after the end token": repr(seen.rows[0].turn.tail),
        "a reply later on": repr(seen.history),
        "prefix kept": f"{yes[seen.keeps_prefix]}: the conversation up to a reply begins every longer one",
        "tokens as text": f"{yes[seen.decodes]}: the tokens of each row are decoded to what the template writes",
        "tokens at the seam": f"{yes[seen.seamless]}: prompt and reply as one text have the same tokens",
        "thinking blocks": f"replies are taken {'with one only' if seen.thinking else taken}",
        "system message": yes[seen.system],
        "fixed": "; ".join(template.fixed(tokenizer.chat_template)) or "nothing",
        **{f"refused ({number})": f"{shape}: {why}" for number, (shape, why) in enumerate(seen.refused.items(), 1)},
        "removed from texts": " ".join(marks[:SHOWN]) + (f" and {len(marks) - SHOWN} more" if marks[SHOWN:] else ""),
    }
    return [*lines, "", *(f"{name:<21} {value}" for name, value in facts.items())]


def _takes_thinking(tokenizer: Any) -> bool:
    question: Message = {"role": "user", "content": QUESTIONS[0]}
    return chat.refusal(tokenizer, [question], THOUGHT + REPLIES[0]) is None


def show(arguments: list[str]) -> None:
    """Print the report of `threefold template [CHECKPOINT or RUN/STAGE] [KEY=VALUE ...]`; of our own without a name."""
    names = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    if len(names) > 1:
        raise UserError(f"template: {names[1]}: name one checkpoint, or one stage of a run as RUN/STAGE")
    for run in (argument for argument in overrides if argument.startswith("run=")):
        raise UserError(f"{run}: a stage of a run is named as RUN/STAGE: threefold template {run[4:]}/sft")
    if names:
        overrides = ["model=hf", f"model.checkpoint={names[0]}", *overrides]
    config = compose(overrides)
    made = Path(config.runs, names[0]) if names else None
    if made and (made / "metrics.json").is_file():
        tokenizer = chat.load_tokenizer(made)
    elif config.model.checkpoint:
        tokenizer = tokenizer_stage.from_checkpoint(config.model, config.tokenizer.template_date, weights=False)
    else:
        tokenizer = tokenizer_stage.train([], 300)
    print("\n".join(report(tokenizer)))

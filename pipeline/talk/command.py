"""`threefold chat`: talk with a model of a run, line by line, in a terminal or through a pipe.

Replies go to stdout, everything else to stderr. Torch is imported once the artifacts are known to be there.
"""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig

from threefold.config.compose import make_command
from threefold.errors import UserError, nearest
from threefold.evaluation.players import player, stages_of
from threefold.stages import STAGES

COMMANDS = {
    "/reset": "forget the conversation",
    "/system": "TEXT is the system message from now on, nothing is none; this forgets the conversation as well",
    "/model": "NAME replies from now on, for example ppo_best_of_8",
    "/help": "list these commands",
    "/quit": "end, as Ctrl-D does",
}


def talk(config: DictConfig, overrides: list[str]) -> None:
    """Reply to each line of stdin until it ends.

    From a terminal, mistakes are answered and the talk goes on. Through a pipe each line that is no command
    gives one line, an empty one an empty line, and a mistake raises `UserError`, as a missing artifact always does.
    """
    interactive = sys.stdin.isatty()
    cast(io.TextIOWrapper, sys.stdin).reconfigure(encoding="utf-8", errors="replace")
    try:
        session = Session(config, overrides)
        for line in typed(session) if interactive else sys.stdin:
            if line.strip() == "/quit":
                break
            _take(session, line.strip(), interactive)
    except KeyboardInterrupt:
        sys.exit(130)


def _take(session: "Session", line: str, interactive: bool) -> None:
    try:
        if line.startswith("/"):
            session.command(line)
        elif interactive and line:
            print(f"{session.name}> {session.reply(line)}", flush=True)
        elif not interactive:
            print(" ".join(session.reply(line).splitlines()) if line else "", flush=True)
    except UserError as error:
        if not interactive:
            raise
        _tell(str(error))


def typed(session: "Session") -> Iterator[str]:
    """Lines as a person types them, with history and editing, until Ctrl-D."""
    import readline  # noqa: F401  gives both to input()

    _tell(f"{session.name} of run {session.config.run} replies; {', '.join(COMMANDS)}")
    while True:
        try:
            yield input("you> ")
        except EOFError:
            _tell("")
            return


class Session:
    """A conversation with the model `name`, and the commands that change it."""

    def __init__(self, config: DictConfig, overrides: list[str]):
        self.config, self.overrides, self.told = config, overrides, False
        speaker = self.speaker(config.chat.model)
        from threefold.talk.conversation import Conversation

        self.conversation = Conversation(speaker, config.chat.system, config.chat.seed)

    def speaker(self, name: str) -> Any:
        """Who replies from now on. Raises `UserError` for an unknown name and a missing artifact."""
        folders = made(name, self.config, self.overrides)
        from threefold.execution.job import quiet_libraries
        from threefold.talk.conversation import Speaker

        quiet_libraries()
        speaker = Speaker(player(name, "chat.model"), folders, self.config)
        self.name = name
        return speaker

    def reply(self, line: str) -> str:
        """The reply; that older turns were dropped is said once."""
        reply = self.conversation.reply(line)
        if self.conversation.forgotten and not self.told:
            self.told = True
            _tell("the context is full: the oldest turns are dropped from now on (/reset begins anew)")
        return reply

    def command(self, line: str) -> None:
        """Do what a line that begins with a slash asks for; a terminal is told what changed.

        Raises `UserError` for one that is no command.
        """
        name, _, rest = line.partition(" ")
        change = "the conversation begins anew"
        if name == "/reset":
            self.conversation.turns = []
        elif name == "/system":
            self.conversation.system, self.conversation.turns = rest.strip() or None, []
            change = f"the system message is {self.conversation.system or 'none'}; {change}"
        elif name == "/model" and rest.strip():
            self.conversation.speaker = self.speaker(rest.strip())
            change = f"{self.name} replies from now on"
        elif name == "/help":
            change = "\n".join(f"{command} {meaning}" for command, meaning in COMMANDS.items())
        else:
            commands = "; ".join(f"{command} {meaning}" for command, meaning in COMMANDS.items())
            raise UserError(f"{line}: no such command{nearest(name, COMMANDS)}; {commands}")
        if sys.stdin.isatty():
            _tell(change)


def made(name: str, config: DictConfig, overrides: list[str]) -> dict[str, Path]:
    """The folders of the artifacts that a player needs, by stage.

    Raises `UserError` for an unknown name, and for an artifact that the run lacks, with the command that makes it.
    """
    run, needed = Path(config.runs) / config.run, stages_of([player(name, "chat.model")])
    folders = {stage: run / stage for stage in STAGES if stage in needed}
    for stage, folder in folders.items():
        if not (folder / "manifest.json").is_file():
            command = make_command(stage, overrides, "chat")
            raise UserError(f"chat.model={name}: run {config.run} has no {stage} yet; make it with: {command}")
    return folders


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

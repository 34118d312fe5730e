"""What is typed after `threefold`: a command, overrides and options, taken apart; and what a shell completes.

Options of Hydra's applications are taken, or answered with what to do instead. Nothing here imports torch.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any

from threefold.errors import UserError, nearest

OF_COMMAND = {"compare": "report", "wandb": "dashboard"}  # option → the command that it belongs to
# section of the configuration → the commands that read it; `config` prints all
OF_SECTION = {
    "chat": ("chat",),
    "dashboard": ("dashboard",),
    "sweep": ("sweep", "submit"),
    "label": ("label", "report"),
}
TARGETED = ("run", "submit", "sweep", "config")  # commands that make what `target` says: they take a stage's name alone
NEEDS = {  # what an option takes, said where it was given something else
    "--compare": "name the run to set beside it, for example --compare demo-2",
    "--config-dir": "name a folder that holds experiment/NAME.yaml and the like, for example --config-dir conf",
    "--completion": "name the shell: bash, zsh or fish",
    "--cfg": "prints the composed configuration: write --cfg job",
    "--multirun": "takes no value",
    "--wandb": "takes no value",
    "--version": "takes no value",
    "--help": "takes no value",
}
HYDRAS = {  # other options of Hydra's applications, and what to do instead
    "--info -i": "`threefold config` prints the composed configuration, `threefold status` what a run would make",
    "--config-name -cn": "a run is chosen by experiment=NAME, from a folder of your own with --config-dir DIR",
    "--config-path -cp": "conf/ stays, and --config-dir DIR adds a folder of your own",
    "--run -r": "`threefold run` makes a run, and run=NAME names it",
    "--resolve": "the configuration is printed resolved; leave it out",
    "--package -p": "the whole configuration is printed; leave it out",
    "--hydra-help": "`threefold --help` lists the commands, and conf/ has every key with its meaning",
    "--shell-completion -sc": "`threefold --completion bash` prints what a shell needs (or zsh, fish)",
    "--experimental-rerun": "give the same command again: it continues the run",
}
VERSIONED = ("threefold", "torch", "transformers", "trl", "hydra-core")  # as bug reports need them
HELP = """\
Overrides use Hydra's syntax: threefold run target=ppo ppo.kl_coef=0.1 experiment=demo
A stage's name alone is its target: threefold run ppo
Every key with its meaning is in conf/; `threefold config`, or --cfg job, prints them with their values.

options:
  --config-dir DIR    find groups in a folder of your own as well: DIR/experiment/mine.yaml is experiment=mine
  --completion SHELL  print what completes commands, keys and choices in bash, zsh or fish
  --version           print the versions of Threefold and its libraries"""


OPTIONS: dict[str, dict[str, Any]] = {
    "--help -h": {"action": "help"},
    "--version": {"action": "store_true"},
    "--config-dir -cd": {"action": "append", "metavar": "DIR"},
    "--cfg -c": {"choices": ("job",)},  # as Hydra's applications have it
    "--multirun -m": {"action": "store_true"},
    "--completion": {"choices": ("bash", "zsh", "fish")},
    "--compare": {"metavar": "RUN", "action": "append"},
    "--wandb": {"action": "store_const", "const": True},
    **{flags: {"nargs": "?", "const": True} for flags in HYDRAS},
}
TAKE_VALUE = {flag for flags, how in OPTIONS.items() if {"metavar", "choices"} & how.keys() for flag in flags.split()}


class _Parser(argparse.ArgumentParser):
    """A parser whose options may stand anywhere between overrides, for shells as well."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """As argparse has it, with options before all other words; one at the end that has no value stays there."""
        options, others, words = [], [], list(args)
        while words:
            word = words.pop(0)
            place = options if word.startswith("-") and (words or word not in TAKE_VALUE) else others
            place.append(word)
            if word in TAKE_VALUE and words:
                place.append(words.pop(0))
        return super().parse_known_args([*options, *others], namespace)


def _parser(commands: Mapping[str, str]) -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<9} {text}" for name, text in commands.items())
    parser = _Parser(
        prog="threefold",
        usage="threefold COMMAND [KEY=VALUE ...]",
        allow_abbrev=False,
        add_help=False,
        exit_on_error=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Pretrain, fine-tune and align a language model.\n\ncommands:\n{listed}",
        epilog=HELP,
    )
    command: Any = parser.add_argument("command", nargs="?", metavar="COMMAND", help=argparse.SUPPRESS)
    command.completer = lambda **_: commands
    overrides: Any = parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=argparse.SUPPRESS)
    overrides.completer = _completions
    for flags, how in OPTIONS.items():
        parser.add_argument(*flags.split(), help=argparse.SUPPRESS, **how)
    return parser


def _completions(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    from threefold.config.names import completions

    return completions(prefix, parsed_args.config_dir or ())


def parse(arguments: list[str], commands: Mapping[str, str]) -> tuple[str, list[str], dict[str, str]]:
    """The command, its overrides and its options; prints what is asked about the program itself, and exits.

    `commands` are the names of all commands with what they do. Raises `UserError` for what no command takes.
    """
    parser = _parser(commands)
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what can follow
        import argcomplete

        theirs = [flag for flags in HYDRAS for flag in flags.split()]
        argcomplete.autocomplete(parser, always_complete_options=False, exclude=theirs, print_suppressed=True)
    try:
        parsed, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        flag = str(error.argument_name).partition("/")[0]
        raise UserError(f"{flag}: {NEEDS[flag]}") from error
    _refuse_options(parsed, unknown)
    _answer_about_itself(parser, parsed)
    if "=" in (parsed.command or "") and (parsed.cfg or parsed.multirun):  # these need no command
        parsed.command, parsed.overrides = None, [parsed.command, *parsed.overrides]
    command = parsed.command or ("config" if parsed.cfg else "run")
    if command not in commands:
        raise UserError(_no_command(command, parsed.overrides, commands))
    if not (parsed.cfg or parsed.multirun):
        _require_readers(command, parsed.overrides)
    overrides = _with_target(command, parsed.overrides)
    if parsed.config_dir:
        from threefold.config.overrides import search_path

        overrides = [search_path(parsed.config_dir), *overrides]
    if parsed.multirun and command != "sweep":
        from threefold.config.overrides import as_arguments

        raise UserError(f"--multirun: sweeps have a command of their own: threefold sweep {as_arguments(overrides)}")
    if parsed.compare:
        if len(parsed.compare) > 1:
            raise UserError(f"--compare: takes one run, and has {' and '.join(parsed.compare)}")
        [parsed.compare] = parsed.compare
    options = {name: value for name in OF_COMMAND if (value := getattr(parsed, name)) is not None}
    for name in options:
        if parsed.cfg or command != OF_COMMAND[name]:
            raise UserError(
                f"--{name}: is an option of {OF_COMMAND[name]}, not of {'--cfg' if parsed.cfg else command}"
            )
    return "config" if parsed.cfg else command, overrides, options


def _refuse_options(parsed: argparse.Namespace, unknown: list[str]) -> None:
    for flags, answer in HYDRAS.items():
        flag = flags.partition(" ")[0]
        if getattr(parsed, flag.strip("-").replace("-", "_")) is not None:
            raise UserError(f"{flag}: is an option of Hydra's; {answer}")
    if unknown:
        raise UserError(f"{unknown[0]}: no such option; overrides are written KEY=VALUE{_as_override(unknown[0])}")


def _as_override(option: str) -> str:
    """The override that an unknown option may mean, or the nearest option."""
    from threefold.config.names import keys, nearest_key, same_name

    key, _, value = option.lstrip("-").replace("-", "_").partition("=")
    if key in keys():
        return f": {key}={value or 'VALUE'}"
    flags = [flag.removeprefix("--") for flag in NEEDS]
    return nearest_key(key) if same_name(key) else nearest(key, flags).replace(": ", ": --")


def _answer_about_itself(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
    """Print the help, the versions or what a shell needs, where that is asked, and exit."""
    if parsed.version:
        from importlib.metadata import version  # takes a while

        print(", ".join(f"{name} {version(name)}" for name in VERSIONED))
    elif parsed.completion:
        import argcomplete

        print(argcomplete.shellcode(["threefold"], shell=parsed.completion))
    elif parsed.command == "help" or (parsed.command is None and not parsed.cfg and not parsed.multirun):
        parser.print_help()
    else:
        return
    sys.exit(0)


def _no_command(word: str, overrides: list[str], commands: Mapping[str, str]) -> str:
    """The answer to a word that is no command, with the command that it may mean."""
    from threefold.config.names import choices
    from threefold.config.overrides import as_arguments
    from threefold.stages import STAGES

    key = "target" if word in STAGES else "experiment" if word in choices("experiment") else ""
    if key or "=" in word:
        first = f"{key}={word}" if key else word
        return f"{word}: no such command; write threefold run {as_arguments([first, *overrides])}"
    return f"{word}: no such command{nearest(word, commands)}; there are {', '.join(commands)}"


def _require_readers(command: str, overrides: list[str]) -> None:
    """Raise `UserError` for a key that only another command reads."""
    for text in overrides:
        if command == "runs" and text.startswith("run="):
            raise UserError(f"{text}: `threefold runs` lists all runs; `threefold status {text}` shows one")
        readers = OF_SECTION.get(text.lstrip("+~").partition(".")[0], (command,))
        if command not in (*readers, "config"):
            raise UserError(f"{text}: is read by `threefold {'` and `threefold '.join(readers)}`, not by {command}")


def _with_target(command: str, overrides: list[str]) -> list[str]:
    """Overrides with the name of a stage written out as the target; raises `UserError` where there is no one target."""
    if all("=" in text for text in overrides):
        return overrides
    from threefold.stages import STAGES

    targets = [text for text in overrides if text in STAGES or text.lstrip("+").startswith("target=")]
    for stage in set(targets) & set(STAGES):
        if command == "chat":
            raise UserError(f"{stage}: a model is chosen with chat.model={stage}")
        if command not in TARGETED:
            raise UserError(f"{stage}: `threefold {command}` is about a whole run; leave the stage out")
        if len(targets) > 1:
            raise UserError(f"{', '.join(targets)}: a run has one target; name the last stage, it makes what it needs")
    return [f"target={text}" if text in STAGES else text for text in overrides]

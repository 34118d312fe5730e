"""The command line: `threefold COMMAND [overrides]`. It answers help, status and mistakes without importing torch."""

import argparse
import os
import sys

from pipeline.errors import UserError, nearest

COMMANDS = {
    "run": "make what is stale: the whole chain, or target=STAGE with everything that it needs",
    "status": "show each stage: fresh, stale and why, running, failed",
    "report": "write summary.json and report.html of a run again from its folder",
    "frontier": "measure gold and proxy reward against KL for best-of-n, DPO and PPO, with several seeds",
    "label": "serve the page where people compare replies, on this machine alone",
    "dashboard": "look at tracked runs: trackio's page, or W&B's in the terminal; --wandb sets up W&B's workspace",
    "sync": "send W&B runs that were made offline",
    "config": "print the composed configuration",
}


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exits with status 2 after one line on bad input, 130 when interrupted."""
    try:
        sys.path.insert(0, "")  # reward functions by import path may lie beside the user
        command, overrides = _parse(sys.argv[1:] if arguments is None else arguments)
        globals()[f"_{command}"](overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def _parse(arguments: list[str]) -> tuple[str, list[str]]:
    commands = "\n".join(f"  {name:<9} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="threefold",
        usage="threefold COMMAND [KEY=VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Pretrain, fine-tune and align a language model.\n\ncommands:\n{commands}",
        epilog="Overrides use Hydra's syntax: threefold run target=ppo ppo.kl_coef=0.1 experiment=demo\n"
        "Every key with its meaning is in conf/; `threefold config` prints them with their values.",
    )
    parser.add_argument("command", nargs="?", metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=argparse.SUPPRESS)
    known, unknown = parser.parse_known_args(arguments)
    if known.command == "dashboard" and unknown == ["--wandb"]:
        return "dashboard", [*known.overrides, "dashboard.show=wandb"]
    if unknown:
        raise UserError(f"{unknown[0]}: no such option; overrides are written KEY=VALUE")
    if known.command is None:
        parser.print_help()
        sys.exit(0)
    if known.command not in COMMANDS:
        raise UserError(
            f"{known.command}: no such command{nearest(known.command, COMMANDS)}; there are {', '.join(COMMANDS)}"
        )
    return known.command, known.overrides


def _run(overrides: list[str]) -> None:
    from pipeline.chain import bring_up_to_date
    from pipeline.config import compose
    from pipeline.report import print_table, write_report

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("started by a multi-process launcher: one process makes a run; start threefold by itself")
    config = compose(overrides)
    if config.seeds is not None:
        from pipeline import seeds

        seeds.run(config, overrides)
    elif not bring_up_to_date(config):
        print("nothing to do: every stage is fresh")
    print_table(write_report(config))


def _status(overrides: list[str]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from pipeline.chain import status
    from pipeline.config import compose

    table = Table("stage", "state", "reason", "fingerprint", "made", "main metric", box=None, header_style="bold")
    for row in status(compose(overrides)):
        table.add_row(row["stage"], row["state"], escape(row["reason"]), row["fingerprint"], row["made"], row["metric"])
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _report(overrides: list[str]) -> None:
    from pipeline.config import compose
    from pipeline.report import print_table, write_report

    print_table(write_report(compose(overrides)))


def _frontier(overrides: list[str]) -> None:
    from pipeline.config import compose

    config = compose(overrides)
    from pipeline import frontier
    from pipeline.report import print_table, write_report

    folder = frontier.write(config, overrides)
    frontier.print_advice(folder)
    print_table(write_report(config))


def _label(overrides: list[str]) -> None:
    from pipeline.config import compose
    from pipeline.label_page import serve

    serve(compose(overrides), overrides)


def _dashboard(overrides: list[str]) -> None:
    from pipeline import dashboard
    from pipeline.config import compose

    dashboard.show(compose(overrides))


def _sync(overrides: list[str]) -> None:
    from pipeline import dashboard
    from pipeline.config import compose

    dashboard.sync(compose(overrides))


def _config(overrides: list[str]) -> None:
    from omegaconf import OmegaConf

    from pipeline.config import compose

    print(OmegaConf.to_yaml(compose(overrides)), end="")


if __name__ == "__main__":
    main()

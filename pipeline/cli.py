"""The command line: `threefold COMMAND [overrides]`. It answers help, status and mistakes without importing torch."""

import sys
from collections.abc import Callable
from pathlib import Path

from threefold.arguments import parse
from threefold.errors import UserError, public, public_traceback

WORKING = ("run", "submit", "frontier", "sweep", "chat")  # commands that use models, or send jobs that do


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exits with 2 after a line on bad input, 130 when interrupted, 1 where runs of a sweep failed."""
    sys.excepthook = lambda kind, error, trace: print(public_traceback(error), file=sys.stderr, end="")
    try:
        sys.path.insert(0, "")  # reward functions by import path may lie beside the user
        command, overrides, options = _parse(sys.argv[1:] if arguments is None else arguments)
        sys.argv[1:] = map(public, sys.argv[1:])  # which trackers save
        if command in WORKING:
            from threefold.execution.launch import leave_launchers  # help does not wait for the schema

            leave_launchers()
        COMMANDS[command][0](overrides, **options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def _parse(arguments: list[str]) -> tuple[str, list[str], dict[str, str]]:
    return parse(arguments, {name: text for name, (_, text) in COMMANDS.items()})


def _run(overrides: list[str]) -> None:
    from threefold import api

    config, overrides = api.begin(overrides)
    if config.launch.node_rank > 0:
        from threefold.execution.launch import take_part
        from threefold.execution.nodes import help_out

        return help_out(config.launch, Path(config.runs) / "artifacts", take_part)
    config, overrides = api.last_round(config, overrides)
    if not api.bring_up_to_date(config, overrides):
        print("nothing to do: every stage is fresh")
    # a wrong key does not wait for the libraries of the report
    from threefold.report import print_table, write_report

    print_table(write_report(config))


def _submit(overrides: list[str]) -> None:
    from threefold import api
    from threefold.chain import keep_choices, wanted
    from threefold.chain.plans import Member
    from threefold.display.parts import print_rows
    from threefold.runs import seeds, sweep_space, trials
    from threefold.slurm import submission

    if several := sweep_space.is_sweep(overrides):
        config, overrides, space = sweep_space.read(overrides)
        api.let_go(config)
        members = trials.composed(config, overrides, space)
    else:
        config, overrides = api.begin(overrides)
        several = config.seeds is not None
        members = seeds.composed(config, overrides) if several else [Member(config, overrides)]
    rows = submission.rows(submission.submit(members))
    if several:
        keep_choices(config, overrides, wanted(config))
    if not rows:
        print("nothing to do: every stage is fresh")
    else:
        print_rows([("stage", "job", "after", "asks for", "for"), *rows])


def _status(overrides: list[str]) -> None:
    from threefold import api
    from threefold.display.parts import print_rows

    columns = ("stage", "state", "reason", "fingerprint", "made", "metric")
    rows = [[row[name] for name in columns] for row in api.states(api.composed(overrides))]
    print_rows([(*columns[:-1], "main metric"), *rows])


def _cancel(overrides: list[str]) -> None:
    from threefold.config.choices import compose_run
    from threefold.display.parts import print_rows
    from threefold.slurm import job_records

    config, _ = compose_run(overrides, reads=True)
    rows = [(row["stage"], row["job"], row["state"]) for row in job_records.cancel_jobs(config)]
    if not rows:
        print(f"nothing to cancel: run {config.run} has no jobs in Slurm")
    else:
        print_rows([("stage", "job", "state"), *rows])


def _report(overrides: list[str], compare: str | None = None) -> None:
    from threefold import api, chain

    config = api.composed(overrides)
    chain.require_finished(config)  # the report's libraries take seconds to load
    from threefold.report import print_table, write_report

    print_table(write_report(config, compare))


def _frontier(overrides: list[str]) -> None:
    from threefold import api

    config, overrides = api.begin(overrides)
    from threefold.report import print_table, write_report
    from threefold.runs import frontier

    folder = frontier.write(config, overrides)
    frontier.print_advice(folder)
    print_table(write_report(config))


def _sweep(overrides: list[str]) -> None:
    from threefold import api
    from threefold.runs import sweep_space

    config, fixed, space = sweep_space.read(overrides)
    api.let_go(config)
    from threefold.runs import sweep

    swept = sweep.run(config, fixed, space)
    if swept["made_from"]:  # a report is of a run's stages
        from threefold.report import write_report

        print(f"report with plots: {write_report(config) / 'report.html'}")
    if swept["failed"]:
        sys.exit(1)  # the table is there, without them; the same command makes them alone


def _label(overrides: list[str]) -> None:
    from threefold.config.choices import compose_run
    from threefold.labelling.page import serve

    serve(compose_run(overrides, reads=True)[0], overrides)


def _chat(overrides: list[str]) -> None:
    from threefold.config.choices import compose_run
    from threefold.talk.command import talk

    talk(compose_run(overrides, reads=True)[0], overrides)


def _template(arguments: list[str]) -> None:
    from threefold.talk import clinic

    clinic.show(arguments)


def _dashboard(overrides: list[str], wandb: bool = False) -> None:
    from threefold.config.choices import compose_run
    from threefold.tracking import dashboard

    dashboard.show(compose_run([*overrides, "dashboard.show=wandb"] if wandb else overrides)[0])


def _sync(overrides: list[str]) -> None:
    from threefold.config.choices import compose_run
    from threefold.tracking import dashboard

    dashboard.sync(compose_run(overrides)[0])


def _config(overrides: list[str]) -> None:
    from omegaconf import OmegaConf

    from threefold.config.choices import compose_run

    print(OmegaConf.to_yaml(compose_run(overrides)[0]), end="")


def _runs(overrides: list[str]) -> None:
    from threefold.chain.plans import listing
    from threefold.config.compose import compose
    from threefold.display.parts import print_rows

    config = compose(overrides)
    rows = listing(Path(config.runs))
    if not rows:
        print(f"no run in {config.runs}")
    else:
        print_rows(rows)


COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "run": (_run, "make what is stale: the whole chain, or target=STAGE with everything that it needs"),
    "submit": (
        _submit,
        "send what is stale to Slurm, of a sweep for all runs, a job for each stage, and return at once",
    ),
    "status": (_status, "show each stage: fresh, stale and why, queued, running, failed"),
    "runs": (_runs, "list the runs: when their last stage was made, and the main metric of every finished stage"),
    "cancel": (_cancel, "end the jobs of a run in Slurm, and of its variants"),
    "frontier": (_frontier, "measure gold and proxy reward against KL for best-of-n, DPO and PPO, with several seeds"),
    "sweep": (_sweep, "make a run with several values of some keys, or search them with Optuna: a table and plots"),
    "report": (_report, "write the report of a run again from its folder; --compare RUN sets another run beside it"),
    "label": (_label, "serve the page where people compare replies, on this machine alone"),
    "chat": (_chat, "talk with a model of a run: chat.model=ppo, chat.model=ppo_best_of_8"),
    "template": (_template, "show what a model is given and trained on by a chat template: CHECKPOINT or RUN/STAGE"),
    "dashboard": (
        _dashboard,
        "look at tracked runs: trackio's page, or W&B's in a terminal; --wandb sets up its workspace",
    ),
    "sync": (_sync, "send W&B runs that were made offline"),
    "config": (_config, "print the composed configuration"),
}


if __name__ == "__main__":
    main()

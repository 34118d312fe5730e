"""Slurm without a Slurm: what is sent, after what and for whom, what is said of it, and what a job does."""

import os
import stat
import types
from collections import Counter

import pytest
from helpers import composed

from threefold import chain, cli
from threefold.artifacts.artifact import Artifact
from threefold.chain.plans import Member
from threefold.errors import UserError
from threefold.fileio import read_json, write_json
from threefold.slurm import client, job_records, submission
from threefold.slurm.job_records import Record

STAGES = ["tokenizer", "pretrain", "sft", "comparisons", "reward", "dpo", "ppo", "evaluate"]


@pytest.fixture
def lab(monkeypatch, tmp_path):
    """A Slurm that takes every job (`sent`: id → what it asks for) and says of it what `states` holds: queued."""
    world = types.SimpleNamespace(sent={}, work={}, states={}, cancelled=[], runs=tmp_path / "runs", refuses=None)

    def send(work, folder, timeouts, options):
        if work.stage == world.refuses:
            raise UserError(f"{options['job_name']}: Slurm refuses it: invalid partition")
        job = str(101 + len(world.sent))
        world.sent[job], world.work[job] = options, work
        world.states[job] = client.state("PENDING", "Priority")
        return job

    monkeypatch.setattr(client, "send", send)
    monkeypatch.setattr(client, "states", lambda jobs: {job: world.states[job] for job in jobs if job in world.states})
    monkeypatch.setattr(client, "cancel", world.cancelled.extend)
    monkeypatch.setattr(client, "require", lambda: None)
    monkeypatch.setattr(submission.chain, "check_sources", lambda *_: None)
    monkeypatch.setattr(submission.chain, "check_rewards", lambda *_: None)

    def config(*overrides):
        changed = composed("tracker=none", "runtime.threads=1")
        changed.merge_with_dotlist([f"runs={world.runs}", *overrides])
        return changed

    world.config = config
    world.member = lambda *overrides: Member(world.config(*overrides), ["experiment=smoke", *overrides])
    world.submit = lambda *members: submission.submit([world.member(*each) for each in members])
    world.stage_of = lambda job: world.work[job].stage
    world.job = lambda stage: next(job for job in world.sent if world.stage_of(job) == stage)
    world.rows = lambda *overrides: {
        row["stage"]: (row["state"], row["reason"])
        for row in job_records.with_jobs(world.config(*overrides), chain.status(world.config(*overrides)))
    }
    return world


def test_records_with_more_than_is_known_of_them_are_read(lab):
    lab.submit(("target=tokenizer",))
    [(artifact, record)] = job_records.all_of(lab.runs).values()
    write_json(job_records.file_of(artifact), read_json(job_records.file_of(artifact)) | {"sent": "2026-01-01"})
    assert job_records.read(artifact) == record


def test_scancel_that_fails_is_said_on_one_line(tmp_path, monkeypatch):
    (tmp_path / "scancel").write_text("#!/bin/sh\necho 'scancel: error: Access denied' >&2\nexit 1\n")
    (tmp_path / "scancel").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match=r"^Slurm: scancel says scancel: error: Access denied$"):
        client.cancel(["7"])


def finish(artifact: Artifact) -> None:
    artifact.folder.mkdir(parents=True)
    write_json(artifact.folder / "manifest.json", {"created": "now", "parts": {}})
    write_json(artifact.folder / "metrics.json", {})


def after(lab, job):
    given = lab.sent[job].get("dependency", "afterok:").removeprefix("afterok:")
    return [lab.stage_of(other) for other in given.split(":") if other]


def test_a_chain_is_a_job_for_each_stage_after_those_it_needs(lab):
    wanted = lab.submit([])
    assert [lab.stage_of(job) for job in lab.sent] == STAGES == [each.planned.stage for each in wanted.values()]
    assert {lab.stage_of(job): after(lab, job) for job in lab.sent} == {
        "tokenizer": [], "pretrain": ["tokenizer"], "sft": ["pretrain"], "comparisons": ["sft"],
        "reward": ["sft", "comparisons"], "dpo": ["sft", "comparisons"], "ppo": ["sft", "reward"],
        "evaluate": ["pretrain", "sft", "comparisons", "reward", "dpo", "ppo"],
    }  # fmt: skip
    assert "kill-on-invalid-dep" in lab.sent[lab.job("sft")]["additional_parameters"]
    work = lab.work[lab.job("sft")]
    assert work.overrides == ["experiment=smoke", "target=sft", "dependents=false", "seeds=null"]
    assert [parent.partition("-")[0] for parent in work.parents] == ["pretrain"]


def test_what_is_made_gets_no_job_and_is_linked(lab):
    planned = chain.plan(lab.config())
    for stage in ("tokenizer", "pretrain", "sft"):
        finish(planned[stage].artifact)
    lab.submit([])
    assert [lab.stage_of(job) for job in lab.sent] == STAGES[3:]
    assert after(lab, lab.job("reward")) == ["comparisons"]
    assert (lab.runs / "smoke/sft").resolve() == planned["sft"].artifact.folder


def test_runs_share_the_jobs_of_the_artifacts_that_they_share(lab):
    runs = [["target=ppo", f"ppo.kl_coef={coef}", f"run=smoke/variants/{i}"] for i, coef in enumerate((0.1, 0.2, 0.3))]
    wanted = lab.submit(*runs)
    stages = [lab.stage_of(job) for job in lab.sent]
    assert stages == ["tokenizer", "pretrain", "sft", "comparisons", "reward", "ppo", "ppo", "ppo"]
    assert [len(each.runs) for each in wanted.values()] == [3, 3, 3, 3, 3, 1, 1, 1]
    assert job_records.read(next(iter(wanted.values())).artifact).runs == [f"smoke/variants/{i}" for i in range(3)]


def test_jobs_that_are_queued_are_not_sent_again(lab):
    lab.submit([])
    wanted = lab.submit([], ["dpo.beta=0.7", "run=other"])
    assert [lab.stage_of(job) for job in lab.sent][len(STAGES) :] == ["dpo", "evaluate"]
    assert [each.planned.stage for each in wanted.values() if not each.sent_before] == ["dpo", "evaluate"]
    assert job_records.read(chain.plan(lab.config())["sft"].artifact).runs == ["smoke", "other"]
    assert set(after(lab, list(lab.sent)[-1])) == {"pretrain", "sft", "comparisons", "reward", "dpo", "ppo"}


@pytest.mark.parametrize("ended", ["CANCELLED by 0", "FAILED", "TIMEOUT", "COMPLETED", None])
def test_a_job_that_ended_is_no_reason_not_to_send_another(lab, ended):
    lab.submit(["target=tokenizer"])
    lab.states.update({"101": client.state(ended)} if ended else {})
    if ended is None:
        lab.states.clear()
    wanted = lab.submit(["target=tokenizer"])
    assert list(lab.sent) == ["101", "102"] and not next(iter(wanted.values())).sent_before


def test_what_a_failed_attempt_said_is_forgotten_when_the_stage_is_sent_again(lab):
    artifact = chain.plan(lab.config())["tokenizer"].artifact
    artifact.note_failure("out of memory")
    lab.submit(["target=tokenizer"])
    assert artifact.failure is None


def test_where_one_job_is_refused_none_stays(lab):
    lab.refuses = "sft"
    with pytest.raises(UserError, match=r"threefold-sft-.*: Slurm refuses it: invalid partition"):
        lab.submit([])
    assert lab.cancelled == ["101", "102"] == list(lab.sent)
    assert job_records.all_of(lab.runs) == {}


def test_cancel_ends_the_jobs_of_a_run_and_of_its_variants_but_not_those_of_others(lab):
    lab.submit(["target=dpo"])
    lab.submit(["target=dpo", "dpo.beta=0.7", "run=smoke/variants/a"], ["target=comparisons", "run=other"])
    lab.states["101"] = client.state("COMPLETED")
    rows = {(row["stage"], row["job"]): row["state"] for row in job_records.cancel_jobs(lab.config())}
    kept = "goes on for other"
    assert rows == {
        ("pretrain", "102"): kept, ("sft", "103"): kept, ("comparisons", "104"): kept,
        ("dpo", "105"): "cancelled", ("dpo", "106"): "cancelled",
    }  # fmt: skip
    assert sorted(lab.cancelled) == ["105", "106"]
    assert job_records.cancel_jobs(lab.config("run=third")) == []


def test_status_says_what_slurm_says(lab):
    lab.submit(["target=ppo"], ["target=ppo", "ppo.kl_coef=0.7", "run=smoke/variants/a"])
    assert lab.rows()["tokenizer"] == ("queued", "job 101 (Priority)")
    assert lab.rows()["sft"] == ("queued", "job 103, waits for pretrain")
    planned = chain.plan(lab.config())
    finish(planned["tokenizer"].artifact)
    lab.states |= {"102": client.state("RUNNING", nodes="n1"), "101": client.state("COMPLETED")}
    assert lab.rows()["tokenizer"][0] == "fresh" and lab.rows()["pretrain"] == ("running", "job 102 on n1")
    for job in ("103", "104", "105", "106", "107"):
        lab.states[job] = client.state("CANCELLED by 1000")
    lab.states["102"] = client.state("FAILED", nodes="n1")
    planned["pretrain"].artifact.note_failure("no such file: x.txt")
    rows = lab.rows()
    assert rows["pretrain"][0] == "failed" and rows["pretrain"][1].startswith("no such file: x.txt (job 102, see ")
    assert rows["sft"] == ("not started", "needs pretrain, which was not made")
    everything = job_records.with_jobs(lab.config(), chain.status(lab.config()))
    assert [row["reason"].partition(", for ")[2] for row in everything if row["stage"] == "ppo"][1:] == [
        "smoke/variants/a"
    ]
    lab.states["102"] = client.state("CANCELLED by 1000")
    assert lab.rows()["pretrain"] == ("cancelled", "job 102")


def test_status_goes_without_slurm(lab, monkeypatch, capsys):
    lab.submit(["target=tokenizer"])

    def silent(jobs):
        raise UserError("Slurm: squeue is not on this machine")

    monkeypatch.setattr(client, "states", silent)
    assert lab.rows()["tokenizer"][0] == "missing"
    assert "squeue is not on this machine; jobs are not shown" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "overrides", "expected"),
    [
        ("dpo", [], {"nodes": 1, "gpus": 0, "cpus": 2, "memory_gb": 4.0, "minutes": 120}),
        ("tokenizer", [], {"nodes": 1, "gpus": 0, "cpus": 2, "memory_gb": 4.0, "minutes": 20}),
        ("dpo", ["resources=gpu"], {"nodes": 1, "gpus": 1, "cpus": 8, "memory_gb": 32.0, "minutes": 240}),
        ("dpo", ["resources.nodes=2", "resources.gpus=4", "resources.stages.dpo.cpus=32"],
         {"nodes": 2, "gpus": 4, "cpus": 32, "memory_gb": 4.0, "minutes": 120}),
        ("evaluate", ["resources.nodes=2", "resources.gpus=4", "resources.stages.evaluate.minutes=9"],
         {"nodes": 1, "gpus": 1, "cpus": 2, "memory_gb": 4.0, "minutes": 9}),
    ],
)  # fmt: skip
def test_each_stage_asks_for_what_it_needs(stage, overrides, expected):
    assert client.resources(composed(*overrides), stage) == expected


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["resources.nodes=2"], "launch.mode=single is one process; use launch=ddp"),
        (["launch=multi_node", "launch.nodes=3"], "launch.nodes=3: resources.nodes=1 for dpo; set both alike"),
        (["resources=gpu", "resources.gpus=4"], "launch.processes=1 use as many GPUs of a node"),
        (["launch=ddp", "launch.processes=1", "resources.nodes=3"], "must divide dpo.batch_size=4"),
    ],
)
def test_resources_that_processes_would_not_use_are_refused(overrides, said):
    with pytest.raises(UserError, match=said):
        client.check(composed(*overrides), "dpo")
    client.check(composed(*overrides), "evaluate")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["resources.minutes=2"], "launcher.signal_seconds=90: is more than half of the time limit of pretrain, 2 min"),
        (["resources.stages.evaluate.nodes=2"], "evaluate runs in one process"),
        (["cluster.parameters={mem: 8G}"], "cluster.parameters.mem: is set by other keys"),
        (["resources.stages.dop.gpus=2"], r"resources.stages.dop.gpus is not a configuration key \(nearest"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(overrides, said):
    from threefold.config.compose import compose

    with pytest.raises(UserError, match=said):
        compose(["experiment=smoke", *overrides])


def command(folder, name, script):
    """An executable in `folder`."""
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """A folder whose programs are found before all others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_the_script_says_all_that_is_configured(commands, tmp_path):
    command(commands, "srun", "")
    command(commands, "sbatch", 'echo "Submitted batch job 7"')
    config = composed(
        "resources=gpu", "resources.nodes=2", "cluster.partition=gpus", "cluster.account=lab",
        "cluster.constraint=a100",
        "cluster.setup=[module load cuda]", "++cluster.parameters.nice=5", "launcher.signal_seconds=60",
    )  # fmt: skip
    options = client.parameters(config, "dpo", "threefold-dpo-1", ["4", "5"])
    assert client.send(len, tmp_path / "jobs", 3, options) == "7"
    script = (tmp_path / "jobs/7_submission.sh").read_text()
    for line in (
        "job-name=threefold-dpo-1", "time=240", "nodes=2", "ntasks-per-node=1", "cpus-per-task=8", "gpus-per-node=1",
        "mem=32768M", "partition=gpus", "account=lab", "constraint=a100", "nice=5", "dependency=afterok:4:5",
        "kill-on-invalid-dep=yes", "requeue", "signal=USR2@60",
    ):  # fmt: skip
        assert f"#SBATCH --{line}\n" in script
    assert script.index("module load cuda") < script.index("srun")
    assert "--cpus-per-task=8 --kill-on-bad-exit=1 --mpi=none" in script
    options = client.parameters(composed("launcher.requeue=false"), "dpo", "x", [])
    assert options["additional_parameters"] == {"no-requeue": True} and "gpus_per_node" not in options


def test_what_sbatch_refuses_is_said_on_one_line(commands, tmp_path, capsys):
    command(commands, "srun", "")
    command(commands, "sbatch", 'echo "sbatch: error: invalid partition specified: x\nsbatch: error: no" >&2; exit 1')
    with pytest.raises(UserError, match=r"^threefold-dpo-1: Slurm refuses it: invalid partition specified: x no$"):
        client.send(len, tmp_path, 3, client.parameters(composed(), "dpo", "threefold-dpo-1", []))
    assert capsys.readouterr().err == ""


def test_what_squeue_forgot_sacct_knows_and_other_names_are_not_ours(commands):
    command(commands, "squeue", 'echo "1|PENDING|Dependency||ours"; echo "2|RUNNING|None|n1|another\'s"')
    command(commands, "sacct", 'echo "3|CANCELLED by 0|None|n2|ours"; echo "5|OUT_OF_MEMORY|None|n2|ours"')
    found = client.states({job: "ours" for job in "12345"})
    assert {job: (state.word, state.reason, state.nodes) for job, state in found.items()} == {
        "1": ("queued", "Dependency", ""), "3": ("cancelled", "", "n2"), "5": ("failed", "", "n2"),
    }  # fmt: skip


def test_a_cluster_without_accounts_and_one_that_does_not_answer(commands):
    command(commands, "squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    command(commands, "sacct", 'echo "Slurm accounting storage is disabled" >&2; exit 1')
    assert client.states({"1": "ours"}) == {}
    command(commands, "squeue", 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1')
    with pytest.raises(UserError, match=r"squeue says .*Unable to contact"):
        client.states({"1": "ours"})


@pytest.mark.parametrize(
    ("slurms", "ours"),
    [("PENDING", "queued"), ("REQUEUED", "queued"), ("RUNNING", "running"), ("COMPLETING", "running"),
     ("SUSPENDED", "running"), ("COMPLETED", "done"), ("CANCELLED+", "cancelled"), ("TIMEOUT", "failed"),
     ("NODE_FAIL", "failed"), ("PREEMPTED", "failed"), ("DEADLINE", "failed")],
)  # fmt: skip
def test_slurms_words_in_ours(slurms, ours):
    assert client.state(slurms).word == ours


def scripted(lab, monkeypatch, *looks):
    """Have every sleep of the waiting command change the world by the next of `looks`."""
    steps = iter(looks)
    monkeypatch.setattr(submission.time, "sleep", lambda seconds: next(steps)())


def test_the_command_says_how_each_job_ends_and_what_was_not_started(lab, monkeypatch, capsys):
    members = [lab.member(), lab.member("dpo.beta=0.7", "run=other")]
    planned, others = members[0].planned, members[1].planned

    def first():
        for stage in STAGES[:4]:
            finish(planned[stage].artifact)

    def second():
        finish(planned["reward"].artifact)
        finish(planned["ppo"].artifact)
        finish(planned["dpo"].artifact)
        finish(planned["evaluate"].artifact)
        broken = [job for job, work in lab.work.items() if work.fingerprint == others["dpo"].fingerprint]
        others["dpo"].artifact.note_failure("loss is not a number")
        lab.states |= {broken[0]: client.state("FAILED"), list(lab.sent)[-1]: client.state("CANCELLED")}

    scripted(lab, monkeypatch, first, second)
    failed = submission.make_jobs(members)
    assert set(failed) == {"other"} and failed["other"].startswith("dpo failed: loss is not a number (job 109, see ")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "10 jobs in Slurm" and len(said) == 11
    assert said[1].startswith(f"1 of 10  {planned['tokenizer'].artifact.folder.name} for 2 runs: made")
    assert any("for other: not started: needs dpo, which was not made" in line for line in said)
    assert (lab.runs / "smoke/evaluate").exists() and not (lab.runs / "other/dpo").exists()
    assert (lab.runs / "other/ppo").resolve() == planned["ppo"].artifact.folder


def test_a_job_that_slurm_forgot_or_whose_result_is_not_seen_fails_after_a_while(lab, monkeypatch):
    member = lab.member("target=pretrain")
    seen = iter(range(0, 1000, 40))
    monkeypatch.setattr(submission.time, "monotonic", lambda: next(seen))
    scripted(lab, monkeypatch, lambda: lab.states.update({"101": client.state("COMPLETED")}), *[lab.states.clear] * 3)
    failed = submission.make_jobs([member])
    assert failed["smoke"].startswith("tokenizer failed: job 101 is ") and failed["smoke"].endswith(" is not there")


def test_a_slurm_that_does_not_answer_is_asked_again(lab, monkeypatch, capsys):
    member, known = lab.member("target=tokenizer"), client.states

    def silent(jobs):
        raise UserError("Slurm: squeue does not answer")

    def back():
        monkeypatch.setattr(client, "states", known)
        finish(member.planned["tokenizer"].artifact)

    wanted = submission.submit([member])
    monkeypatch.setattr(client, "states", silent)
    scripted(lab, monkeypatch, lambda: None, back)
    assert submission.wait(wanted, 1) == {}
    assert capsys.readouterr().err == "Slurm: squeue does not answer; asks again\n"


def test_an_interrupt_leaves_the_jobs_and_says_so(lab, monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    scripted(lab, monkeypatch, interrupt)
    with pytest.raises(SystemExit) as ended:
        submission.make_jobs([lab.member("target=tokenizer", "run=smoke/variants/a")])
    assert ended.value.code == 130 and lab.cancelled == []
    own = f"run=smoke runs={lab.runs}"
    assert capsys.readouterr().err == (
        f"the jobs go on: `threefold status {own}`, and to end them `threefold cancel {own}`\n"
    )


@pytest.fixture
def in_job(monkeypatch, lab):
    """A node of Slurm, and the work of the job that makes the tokenizer."""
    here = {"SLURM_JOB_ID": "20007", "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NUM_NODES": "1"}
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    lab.submit([f"runs={lab.runs}", "target=pretrain"])
    lab.runs.mkdir(exist_ok=True)
    return lab


def test_a_job_knows_its_machines(in_job, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert job_records.place("dpo") == [
        "launch.nodes=2", "launch.node_rank=0", "launch.main_address=null", "launch.main_port=20014"
    ]  # fmt: skip
    assert "launch.processes=1" in job_records.place("tokenizer")


def test_a_job_links_its_artifact_into_all_runs_that_want_it(in_job, monkeypatch):
    work = in_job.work[in_job.job("tokenizer")]
    artifact = chain.plan(in_job.config())["tokenizer"].artifact
    in_job.submit(["target=tokenizer", "run=late"])
    monkeypatch.setattr(chain, "bring_up_to_date", lambda config: finish(artifact))
    work()
    assert (in_job.runs / "smoke/tokenizer").resolve() == (in_job.runs / "late/tokenizer").resolve() == artifact.folder
    assert job_records.read(artifact) is None


def test_a_job_refuses_to_make_anything_but_what_it_was_sent_for(in_job):
    work = in_job.work[in_job.job("tokenizer")]
    work.overrides.append("tokenizer.vocab_size=600")
    with pytest.raises(
        UserError, match=r"changed since the job was sent: tokenizer.vocab_size 512 → 600; send it again"
    ):
        work()
    assert "has changed" in chain.plan(in_job.config())["tokenizer"].artifact.failure


def test_a_job_never_makes_what_another_should_have_made(in_job, monkeypatch):
    monkeypatch.setattr(job_records, "VISIBLE", 0)
    with pytest.raises(UserError, match=r"sees no /.*tokenizer-.*; use a folder that all nodes share for runs"):
        in_job.work[in_job.job("pretrain")]()


def test_time_outs_that_are_too_many_are_said_and_a_job_may_not_be_queued_again(in_job, monkeypatch):
    from submitit.core.utils import UncompletedJobError

    def too_often(config):
        raise UncompletedJobError("Job not requeued because: timed-out too many times.")

    work = in_job.work[in_job.job("tokenizer")]
    assert work.checkpoint().function is work
    monkeypatch.setattr(chain, "bring_up_to_date", too_often)
    with pytest.raises(UncompletedJobError):
        work()
    said = chain.plan(in_job.config())["tokenizer"].artifact.failure
    assert said == "came to its time limit too often; raise resources.minutes or launcher.max_timeouts"
    work.requeue = False
    with pytest.raises(UserError, match=r"launcher.requeue=false"):
        work.checkpoint()


def test_a_job_composes_the_experiment_of_a_users_own_folder(lab, tmp_path, monkeypatch):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    mine = "# @package _global_\ndefaults: [smoke, _self_]\nrun: mine\ntokenizer: {vocab_size: 600}\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(mine)
    monkeypatch.chdir(tmp_path)
    options = ["experiment=mine", "tracker=none", "target=tokenizer", f"runs={lab.runs}"]
    cli.main(["submit", "--config-dir", "conf", *options])
    made = []

    def make(config):
        made.append((config.run, config.tokenizer.vocab_size))
        finish(chain.plan(config)["tokenizer"].artifact)

    monkeypatch.setattr(chain, "bring_up_to_date", make)
    for name, value in {"JOB_ID": "20007", "PROCID": "0", "NODEID": "0", "JOB_NUM_NODES": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.chdir("/")
    lab.work[lab.job("tokenizer")]()
    assert made == [("mine", 600)]


def test_the_commands_print_what_was_sent_and_ended(lab, capsys):
    own = ["experiment=smoke", f"runs={lab.runs}", "target=sft", "seeds=2"]
    cli.main(["submit", *own])
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == ["stage", "job", "after", "asks", "for", "for"] and len(rows) == 4
    assert rows[2].split()[:5] == ["sft", "103", "102", "(pretrain)", "1"]
    cli.main(["status", *own])
    assert "job 103, waits for pretrain" in capsys.readouterr().out
    cli.main(["cancel", *own])
    assert capsys.readouterr().out.count("cancelled") == 4
    lab.states.clear()
    cli.main(["cancel", *own])
    assert capsys.readouterr().out == "nothing to cancel: run smoke has no jobs in Slurm\n"


def test_all_runs_of_a_sweep_are_sent_at_once(lab, capsys):
    cli.main(["submit", "experiment=smoke", f"runs={lab.runs}", "method=ppo,dpo", "dpo.beta=0.1,0.3"])
    sent = Counter(work.stage for work in lab.work.values())
    assert sent == {stage: 1 for stage in STAGES} | {"dpo": 2, "evaluate": 3}
    assert "smoke/variants/method=dpo,dpo.beta=0.3" in capsys.readouterr().out
    job = next(work for work in lab.work.values() if "dpo.beta=0.3" in work.overrides and work.stage == "evaluate")
    assert {"evaluate.models=[sft,dpo]", "evaluate.reward_model=true", "dpo.beta=0.3"} <= set(job.overrides)
    with pytest.raises(SystemExit):
        cli.main(["submit", "experiment=smoke", "dpo.beta=0.1,0.3", "sweep.trials=2"])
    assert "a search waits for results" in capsys.readouterr().err


def test_without_slurm_the_command_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        cli.main(["submit", "experiment=smoke", f"runs={tmp_path}"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: Slurm: sbatch is not on this machine")


def test_a_record_is_read_as_it_was_written(tmp_path):
    artifact = Artifact(tmp_path, "sft", "0123456789ab")
    (tmp_path / "artifacts").mkdir()
    record = Record("7", ["demo"], {"pretrain-0": "6"})
    job_records.write(artifact, record)
    assert job_records.read(artifact) == record
    assert read_json(tmp_path / "artifacts/sft-0123456789ab.job")["after"] == {"pretrain-0": "6"}
    assert {name: pair[1] for name, pair in job_records.all_of(tmp_path).items()} == {"sft-0123456789ab": record}

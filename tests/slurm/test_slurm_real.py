"""A run on a real Slurm, whichever answers here: `make test-slurm`. It needs two nodes, and this folder on both."""

import filecmp
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from threefold import chain, cli
from threefold.config.compose import compose
from threefold.errors import UserError
from threefold.fileio import read_json, read_lines
from threefold.runs import variants
from threefold.runs.variants import Variant
from threefold.slurm import job_records
from threefold.stages import STAGES

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
SMALL = [
    "experiment=smoke",
    "runtime.device=cpu",
    "resources.cpus=1",
    "resources.memory_gb=2",
    "launcher.poll_seconds=2",
]
REWARDS = """
import os, time

def patient(prompts, completions, seconds=0.0, **_):
    time.sleep(seconds + float(os.environ.get("PATIENCE", "0")))
    return [len(completion) / 100 for completion in completions]

def broken(prompts, completions, **_):
    raise ValueError("no such luck\\nat all")
"""


def asked(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


@pytest.fixture(scope="session", autouse=True)
def cluster():
    """Skips where no Slurm with two nodes answers; of the session, so that it comes before the smoke run."""
    if shutil.which("sbatch") is None or shutil.which("sinfo") is None:
        pytest.skip("Slurm is not installed here: sbatch is missing")
    up = asked("sinfo", "--noheader", "--Node", "--format=%N", "--states=idle,mixed,allocated")
    if len(set(up.split())) < 2:
        pytest.skip("no Slurm with two nodes that are up answers `sinfo` here")


@pytest.fixture(scope="module")
def place():
    """A folder that all nodes see as far as they see this one, with reward functions that jobs can import."""
    (ROOT / "runs").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="slurm-test-", dir=ROOT / "runs"))
    (folder / "for_slurm.py").write_text(REWARDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]))
        yield folder
    shutil.rmtree(folder)


def with_artifacts(smoke, runs, *stages):
    """A folder of runs that has what the smoke run made of `stages`."""
    (runs / "artifacts").mkdir(parents=True)
    for stage in stages:
        made = (smoke / "smoke" / stage).resolve()
        shutil.copytree(made, runs / "artifacts" / made.name)
    return runs


def weights(run, stage):
    return run / stage / "model.safetensors"


def jobs_by_stage(runs):
    """How many jobs were sent for each stage, by the scripts that they left."""
    scripts = [file.read_text() for file in (runs / "artifacts/slurm").glob("*_submission.sh")]
    return Counter(re.search(r"job-name=threefold-(\w+)-", script)[1] for script in scripts)


def wait_for(found, seconds=600):
    deadline = time.monotonic() + seconds
    while not (seen := found()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.5)
    return seen


def test_a_chain_by_stages_and_a_sweep_that_shares_its_jobs(place, smoke, capsys):
    runs = place / "chain"
    own = [*SMALL, "tracker=none", f"runs={runs}"]
    cli.main(["submit", *own])
    sent = capsys.readouterr().out
    assert [line.split()[0] for line in sent.splitlines()[1:]] == [name for name in STAGES if name != "frontier"]
    records = {name.rpartition("-")[0]: record for name, (_, record) in job_records.all_of(runs).items()}
    for stage, record in list(records.items())[1:]:
        waits = asked("squeue", "--noheader", f"--jobs={record.job}", "--format=%E")
        assert all(f"afterok:{job}" in waits for job in record.after.values()), stage
    cli.main(["status", *own])
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["evaluate"].split()[1] == "queued" and "waits for pretrain, sft" in rows["evaluate"]

    coefs = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5]  # the first is the chain's own
    command = [*own, "launcher=slurm"]
    cli.main(["sweep", *command, "target=ppo", f"ppo.kl_coef={','.join(map(str, coefs))}"])
    swept = read_json(runs / "smoke/sweep.json")
    assert [row["state"] for row in swept["runs"]] == ["complete"] * len(
        coefs
    ) and "Best: ppo.kl_coef" in capsys.readouterr().out
    cli.main(["run", *command])  # waits for the rest of the chain, and reports
    assert "report.html" in capsys.readouterr().out
    once = dict.fromkeys(["tokenizer", "pretrain", "sft", "comparisons", "reward", "dpo", "evaluate"], 1)
    assert jobs_by_stage(runs) == once | {"ppo": len(coefs)}
    folders = [folder for folder in (runs / "artifacts").iterdir() if (folder / "manifest.json").exists()]
    assert Counter(folder.name.rpartition("-")[0] for folder in folders) == once | {"ppo": len(coefs)}
    for stage in ("pretrain", "sft", "reward", "dpo", "ppo"):
        assert filecmp.cmp(weights(runs / "smoke", stage), weights(smoke / "smoke", stage), shallow=False), stage
    made = [runs / row["run"] for row in swept["runs"]]
    assert {(run / "reward").resolve() for run in made} == {(runs / "smoke/reward").resolve()}
    assert len({(run / "ppo").resolve() for run in made}) == len(coefs)
    assert not job_records.all_of(runs)


LONG = ["ppo.reward.function=for_slurm:patient", "ppo.episodes=256", "runtime.checkpoints=16", "target=ppo"]


@pytest.fixture
def urgent():
    """A partition whose jobs preempt those of the default one."""
    if asked("scontrol", "show", "config").find("preempt/partition_prio") < 0:
        pytest.skip("this Slurm does not preempt by partition")
    shown = asked("scontrol", "show", "partition", "--oneliner").splitlines()
    found = {re.search(r"PartitionName=(\S+)", line)[1]: line for line in shown}
    tiers = {name: int(re.search(r"PriorityTier=(\d+)", line)[1]) for name, line in found.items()}
    default = next(name for name, line in found.items() if " Default=YES" in line)
    above = [name for name in tiers if tiers[name] > tiers[default]]
    if not above:
        pytest.skip("no partition of this Slurm preempts the default one")
    return above[0]


def test_preempted_and_timed_out_jobs_end_with_the_bits_of_undisturbed_ones(place, smoke, urgent, monkeypatch):
    parents = ("tokenizer", "pretrain", "sft")
    alone = with_artifacts(smoke, place / "alone", *parents)
    runs = with_artifacts(smoke, place / "disturbed", *parents)
    for seed in (5, 6):
        cli.main(["run", *SMALL, *LONG, "tracker=none", f"ppo.seed={seed}", f"run=seed{seed}", f"runs={alone}"])
    monkeypatch.setenv("PATIENCE", "8")  # 16 rollouts then take more than two minutes
    common = [*SMALL, *LONG, "tracker.mode=offline", f"runs={runs}"]
    cli.main(["submit", *common, "ppo.seed=5", "run=seed5", "resources.minutes=30"])
    cli.main(["submit", *common, "ppo.seed=6", "run=seed6", "resources.minutes=3", "launcher.signal_seconds=60"])
    jobs, works = {}, {}
    for seed in (5, 6):
        config = compose([*common, f"ppo.seed={seed}"])
        artifact = chain.plan(config, chain.wanted(config))["ppo"].artifact
        jobs[seed], works[seed] = job_records.read(artifact).job, artifact.work
    identity = preempt(jobs[5], works[5], urgent)
    for seed in (5, 6):
        cli.main(["run", *common, f"ppo.seed={seed}", f"run=seed{seed}", "launcher=slurm"])
        assert filecmp.cmp(weights(runs / f"seed{seed}", "ppo"), weights(alone / f"seed{seed}", "ppo"), shallow=False)
        assert restarts(jobs[seed]) >= 1
        steps = [[row["step"] for row in read_lines(at / f"seed{seed}/ppo/log.jsonl")] for at in (runs, alone)]
        assert steps[0] == steps[1]
    log = (runs / "artifacts/slurm" / f"{jobs[6]}_0_log.out").read_text()
    assert "this job is timed-out" in log and f"Requeued job {jobs[6]}" in log
    parts = list((runs / "artifacts/wandb").rglob(f"offline-run-*-{identity}"))
    assert len(parts) >= 2, "every part of the preempted job is of one W&B run"


def preempt(job, work, partition):
    """Take the node of a running job away for a moment once it has a checkpoint; returns its W&B id."""
    wait_for(lambda: [file for file in work.glob("checkpoints/rollout-*/state.json") if file.parent.suffix != ".part"])
    node = asked("squeue", "--noheader", f"--jobs={job}", "--format=%N")
    taker = ["sbatch", "--parsable", f"--partition={partition}", f"--nodelist={node}", "--exclusive", "--time=5"]
    identity = (work / "checkpoints/wandb-id.txt").read_text()
    assert asked(*taker, "--output=/dev/null", "--wrap=sleep 1")
    wait_for(lambda: restarts(job) >= 1)
    return identity


def restarts(job):
    return int(re.search(r"Restarts=(\d+)", asked("scontrol", "show", "job", job))[1])


def test_a_job_that_fails_and_one_that_is_cancelled_leave_the_others(place, smoke, capsys):
    runs = with_artifacts(smoke, place / "failing", "tokenizer", "pretrain", "sft")
    command = [*SMALL, "tracker=none", f"runs={runs}", "launcher=slurm", "evaluate.models=[sft,ppo]"]
    patient = "ppo.reward.function=for_slurm:patient"
    members = [
        Variant("variants/broken", ("ppo.reward.function=for_slurm:broken",), "evaluate"),
        Variant("variants/good", (patient,), "ppo"),
        Variant("variants/ended", (patient, "ppo.reward.args={seconds: 300}"), "ppo"),
    ]
    config = compose(members[2].arguments(compose(command), command))
    ended = chain.plan(config, chain.wanted(config))["ppo"].artifact

    def scancel():
        job = wait_for(lambda: job_records.read(ended)).job
        wait_for(lambda: asked("squeue", "--noheader", f"--jobs={job}", "--format=%T") == "RUNNING")
        subprocess.run(["scancel", job], check=True)

    thread = threading.Thread(target=scancel)
    thread.start()
    with pytest.raises(UserError, match=r"2 of 3 variants failed; variants/\w+: ppo (failed: no such luck|cancelled)"):
        variants.make(compose(command), command, members)
    thread.join()
    said = capsys.readouterr().out
    assert re.search(r"ppo-\w+ for smoke/variants/broken: failed: no such luck \(job \d+, see .*_0_log.out\)", said)
    assert re.search(r"evaluate-\w+ for smoke/variants/broken: not started: needs ppo, which was not made", said)
    assert re.search(r"ppo-\w+ for smoke/variants/ended: cancelled: job \d+", said)
    assert re.search(r"ppo-\w+ for smoke/variants/good: made", said)
    assert weights(runs / "smoke/variants/good", "ppo").is_file()
    cli.main(["status", *members[2].arguments(compose(command), command)])
    assert re.search(r"ppo +cancelled +job", capsys.readouterr().out)


def test_a_stage_on_two_nodes_takes_the_steps_of_one_process(place, smoke, capsys):
    runs = with_artifacts(smoke, place / "nodes", "tokenizer", "pretrain", "sft", "comparisons")
    two = ["launch=ddp", "launch.processes=1", "resources.nodes=2", "target=dpo", "launcher=slurm"]
    cli.main(["run", *SMALL, "tracker=none", f"runs={runs}", *two])
    assert read_json(runs / "smoke/dpo/manifest.json")["environment"]["device"].startswith("2 × ")
    logs = list((runs / "artifacts/slurm").glob("*_1_log.out"))
    assert len(logs) == 1 and "takes part as machine 1" in logs[0].read_text()
    here, there = (read_lines(at / "smoke/dpo/log.jsonl") for at in (smoke, runs))
    assert [row["loss"] for row in there if "loss" in row] == pytest.approx(
        [row["loss"] for row in here if "loss" in row], rel=1e-4
    )

"""What CONTRIBUTING.md tells people to do works: its walks name what is there, and its changes apply and run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
CHANGES = dict(re.findall(r"### (.+?)\n.*?```diff\n(.*?)```", TEXT, re.DOTALL))


@pytest.mark.parametrize(("file", "name"), re.findall(r"^\d\. `([\w/.]+)` `(\w+)`:", TEXT, re.MULTILINE))
def test_every_stop_of_a_walk_is_there(file, name):
    assert re.search(rf"^(def |class )?{name}\b", (ROOT / file).read_text(), re.MULTILINE)


def test_walks_have_at_most_eight_stops():
    walks = re.findall(r"^\*\*Where .+?\*\*", TEXT, re.MULTILINE)
    assert len(walks) == 2 and "\n9. " not in TEXT


def test_every_room_is_in_the_tour():
    rooms = {folder.name for folder in (ROOT / "pipeline").iterdir() if (folder / "__init__.py").exists()}
    assert rooms <= set(re.findall(r"`(\w+)/`", TEXT))


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """Run a program or command under a copy of the project, in which every change of the document was made."""
    folder = tmp_path_factory.mktemp("changed")
    for name in ("pipeline", "stages", "rewards", "conf"):
        shutil.copytree(ROOT / name, folder / name)
    for change in CHANGES.values():
        subprocess.run(["git", "apply", "-"], input=change, text=True, check=True, cwd=folder)
    (folder / "pipeline").rename(folder / "threefold")
    for name in ("stages", "rewards", "conf"):
        (folder / name).rename(folder / "threefold" / name)
    environment = os.environ | {"PYTHONPATH": str(folder)}

    def run(*command):
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-c", "import threefold; print(threefold.__path__[0])").strip() == str(folder / "threefold")
    return run


def test_there_is_a_change_of_each_kind():
    assert list(CHANGES) == ["A reward", "A format", "A loss or an estimator", "A stage"]


def test_the_reward_scores(changed):
    code = """
from threefold import rewards
from threefold.config.compose import compose
reward = rewards.load(compose(["reward@ppo.reward=questions"]).ppo.reward)
print(reward(["Hi", "Hi"], ["How are you? ", "Fine."], answer=["", ""]))
"""
    assert json.loads(changed("-c", code)) == [1.0, 0.0]


def test_the_format_is_read(changed, tmp_path):
    file = tmp_path / "faq.jsonl"
    file.write_text("".join(json.dumps({"question": f"What is {i}?", "answer": "A number."}) + "\n" for i in range(50)))
    code = f"""
from threefold.config.compose import compose
from threefold.data import reading
config = compose(["data.replies.path={file}", "data.replies.format=faq"])
print(reading.examples(config.data.replies, "train", config.data.dialogue)[0].reply)
"""
    assert changed("-c", code) == "A number.\n"


def test_the_estimator_is_the_absolute_log_ratio(changed):
    code = """
import torch
from threefold.config.compose import compose
from threefold.ppo.advantages import kl_per_token
compose(["ppo.kl_estimator=abs"])
print(kl_per_token(torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -1.0]), "abs").tolist())
"""
    assert json.loads(changed("-c", code)) == [1.0, 2.0]


@pytest.mark.slow
def test_the_stage_is_made_and_reported(changed, tmp_path):
    changed("-m", "threefold", "run", "experiment=smoke", "tracker=none", f"runs={tmp_path}", "target=lengths")
    metrics = json.loads((tmp_path / "smoke" / "lengths" / "metrics.json").read_text())
    assert 0 < metrics["tokens_mean"] < metrics["tokens_p95"]
    assert "lengths" in (tmp_path / "smoke" / "report.md").read_text()

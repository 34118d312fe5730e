"""Threefold in a folder whose own folders are called as ours are."""

import subprocess
import sys

import pytest

from threefold.artifacts import digests
from threefold.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's project, with packages that end the program when they are imported, and a reward function."""
    for name in ("conf", "stages", "pipeline", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong folder')\n")
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").write_text("")
    (tmp_path / "rewards" / "mine.py").write_text(
        "def letters(prompts, completions, **columns):\n    return [float(text.count('e')) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def threefold(*arguments, typed=""):
    command = [sys.executable, "-m", "threefold", *arguments]
    return subprocess.run(command, input=typed, capture_output=True, text=True)


@pytest.mark.slow
def test_an_own_reward_trains_ppo_and_chat_answers(folder, borrowed):
    common = ["experiment=smoke", "tracker=none", f"runs={borrowed}", "ppo.reward.function=rewards.mine:letters"]
    done = threefold("run", *common, "target=ppo")
    assert done.returncode == 0, done.stderr
    assert "rewards.mine:letters" in (borrowed / "smoke/ppo/config.yaml").read_text()
    done = threefold("chat", *common, "chat.model=ppo", typed="Hello there\n")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1, done.stderr
    done = threefold("config", "reward@ppo.reward=length")
    assert done.returncode == 0 and "rewards.length:length" in done.stdout, done.stderr


def test_a_module_called_as_one_of_ours_is_refused(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "rewards", raising=False)  # of another test
    assert digests.module_of("rewards.length") == "threefold.rewards.length"
    (folder / "rewards" / "length.py").write_text("")
    with pytest.raises(UserError, match=r"rewards.length: is a module of Threefold, and .* has the same name; rename"):
        digests.module_of("rewards.length")
    done = threefold("run", "experiment=smoke", "reward@ppo.reward=length", "target=ppo")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr

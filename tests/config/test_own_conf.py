"""A user's own folder beside conf/: what lies in it composes, goes into every run of a command, and is checked."""

import re
from pathlib import Path

import pytest

from threefold import cli
from threefold.config.compose import compose, make_command
from threefold.config.overrides import as_arguments, own_folders, search_path
from threefold.errors import UserError
from threefold.runs import seeds, sweep_space
from threefold.runs.variants import Variant

MINE = """\
# @package _global_
# Threefold on my own chats.
defaults:
  - override /model: small
  - override /reward@ppo.reward: short

run: mine
seed: 7
ppo: {kl_coef: 0.2}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with `my conf/`: an experiment, a model and a reward."""
    monkeypatch.chdir(tmp_path)
    files = {"experiment/mine": MINE, "model/small": "defaults: [tiny]\nhidden_size: 32\n"}
    files |= {"reward/short": "function: rewards.length:length\nargs: {target: 9}\n"}
    for name, text in files.items():
        place = tmp_path / "my conf" / f"{name}.yaml"
        place.parent.mkdir(parents=True)
        place.write_text(text)
    return tmp_path / "my conf"


def typed(*arguments):
    """The overrides of a command line."""
    return cli._parse([*arguments, "--config-dir", "my conf", "experiment=mine"])[1]


def test_its_groups_compose_beside_ours(folder):
    config = compose(typed("run", "runs=here"))
    assert (config.run, config.seed, config.ppo.kl_coef, config.model.hidden_size) == ("mine", 7, 0.2, 32)
    assert config.ppo.reward.args == {"target": 9} and "hydra" not in config
    assert compose(typed("run", "model=tiny", "seed=8")).seed == 8
    # several folders, and one that is named twice
    (folder.parent / "other" / "tasks").mkdir(parents=True)
    assert compose(typed("run", "-cd", "other", "--config-dir", str(folder))).run == "mine"
    assert compose([*typed("run"), "hydra.searchpath=[other]"]).run == "mine"


def test_only_folders_of_groups_are_read(folder):
    (folder / "runs" / "x").mkdir(parents=True)
    (folder / "runs/x/config.yaml").write_text("[")
    (folder / "experiment" / ".#mine.yaml").symlink_to("nobody@host.1")  # an editor's mark of an open file
    assert compose(typed("run", "runs=other")).runs == "other"


def test_the_experiment_of_the_documentation_composes(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "own_data.md").read_text()
    file = tmp_path / "my/conf/experiment/mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    monkeypatch.chdir(tmp_path)
    for place in re.findall(r"^threefold (\w+) --config-dir (\S+) (.+)$", page, re.MULTILINE):
        command, overrides, _ = cli._parse([place[0], "--config-dir", place[1], *place[2].split()])
        fixed, space = sweep_space.parse(overrides)
        assert compose(fixed).ppo.reward.function == "rewards.length:target_length"
        assert bool(space) == (command == "sweep")
    assert place[0] == "sweep" and compose(["hydra.searchpath=[my/conf]", "experiment=mine"]).run == "mine"


def test_status_shows_its_run(folder, capsys):
    cli.main(["status", "--config-dir", "my conf", "experiment=mine"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["tokenizer", "missing"]


def test_seeds_sweeps_and_jobs_find_it_from_another_folder(folder, monkeypatch):
    overrides = typed("run", "target=ppo", "seeds=2")
    config = compose(overrides)
    swept = typed("sweep", "target=dpo", "dpo.beta=0.1,0.2")
    monkeypatch.chdir("/")  # where a job of Slurm may run
    members = seeds.composed(config, overrides)
    assert [member.config.ppo.seed for member in members] == [7, 8]
    assert {member.config.model.hidden_size for member in members} == {32}
    _, fixed, (dimension,) = sweep_space.read(swept)
    variant = Variant("variants/a", tuple(sweep_space.spelt({dimension.key: dimension.values[1]})), "dpo")
    member = variant.member(compose(fixed), fixed)
    assert (member.config.dpo.beta, member.config.model.hidden_size) == (0.2, 32)


def test_people_read_it_as_an_option(folder):
    overrides = typed("run", "run=a b")
    assert own_folders(overrides) == [str(folder)]
    assert as_arguments(overrides) == f"--config-dir '{folder}' 'run=a b' experiment=mine"
    assert make_command("ppo", overrides, "chat").startswith(f"make ppo ARGS=\"--config-dir '{folder}' ")
    with pytest.raises(UserError, match=rf"threefold sweep --config-dir '{folder}' seed=1,2 experiment=mine$"):
        compose(typed("run", "seed=1,2"))
    with pytest.raises(UserError, match=r"experiment=min: no such choice \(nearest: mine\); .*, mine, smoke$"):
        compose([search_path(["my conf"]), "experiment=min"])


@pytest.mark.parametrize(
    ("content", "answer"),
    {
        "run: mine\n": "mine.yaml: begin it with the line `# @package _global_`",
        "# @package _global_\nppo: {lr: 1}\n": r"mine.yaml: ppo.lr is not a configuration key \(nearest: ppo.learn",
        "# @package _global_\nppo: {kl_coef: high}\n": "ppo.kl_coef=high: must be a number",
        "# @package _global_\nppo: kl_coef: 1\n": "mine.yaml:2: cannot be read as YAML: mapping values are not allowed",
        "# @package _global_\nppo.kl_coef: 1\n": "mine.yaml: ppo.kl_coef is written `kl_coef: 1` below `ppo:`",
        "# @package _global_\nmodel: tiny\n": "below `defaults:`, by the line `- override /model: tiny`",
        "# @package _global_\ndefaults: [model: tiny]\n": "by the line `- override /model: tiny`",
        "# @package _global_\ndefaults: [override /model: tyny]\n": r"model=tyny: no such choice \(nearest: tiny\)",
        "# @package _global_\nhydra: {job: {chdir: true}}\n": "mine.yaml: hydra is not used here",
        "# @package _global_\ntakeover: true\n": "mine.yaml: takeover holds for one command; leave it out",
        "# @package _global_\nrun: 2026_11\n": "mine.yaml: run is a text, and YAML reads it as the number 202611",
        "": "mine.yaml: must set keys",
    }.items(),
)
def test_a_mistake_in_its_experiment_is_answered_with_the_file(folder, content, answer):
    (folder / "experiment" / "mine.yaml").write_text(content)
    with pytest.raises(UserError, match=answer) as caught:
        compose(typed("run"))
    assert "\n" not in str(caught.value)


def test_files_that_would_not_be_read_are_refused(folder):
    (folder / "config.yaml").write_text("seed: 2\n")
    with pytest.raises(UserError, match=r"my conf/config\.yaml: is not read; write what it sets to .*/experiment/NAME"):
        compose(typed("run"))
    (folder / "config.yaml").rename(folder / "experiment" / "demo.yaml")
    with pytest.raises(UserError, match=r"my conf/experiment/demo\.yaml: .* has the same name and is read instead"):
        compose(typed("run"))
    with pytest.raises(UserError, match=r"/experiment: is a group; give the folder above it: --config-dir .*/my conf$"):
        compose(cli._parse(["run", "--config-dir", "my conf/experiment"])[1])
    with pytest.raises(UserError, match=r"--config-dir .*: holds no group, for example .*/experiment/mine\.yaml$"):
        compose(cli._parse(["run", "--config-dir", "."])[1])
    with pytest.raises(UserError, match=r"hydra.searchpath=a,b: .* is a list; write hydra.searchpath=\[a,b"):
        compose(["hydra.searchpath=a,b"])
    with pytest.raises(UserError, match=r"--config-dir .*/nowhere: there is no such folder"):
        compose(cli._parse(["run", "--config-dir", "nowhere"])[1])

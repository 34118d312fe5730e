"""Offline runs are found and sent, dashboards opened or refused in one line, and the workspace fits W&B's schema."""

import json
import subprocess

import pytest
from documents import documented
from omegaconf import OmegaConf

from threefold import cli
from threefold.artifacts.artifact import Artifact
from threefold.errors import UserError
from threefold.tracking import dashboard, trackers

DESCRIBED = OmegaConf.to_container(OmegaConf.load(dashboard.WORKSPACE))["sections"]
VIEWS = {
    "ppo": {"samples", "scores", "advantages", "ratios"},
    "reward": {"reliability", "accuracy_by_gap", "probes"},
}


def config(runs, show="auto"):
    """As much of the configuration as the dashboard looks at."""
    tracker = {"entity": "someone", "project": "threefold"}
    return OmegaConf.create({"runs": str(runs), "dashboard": {"show": show, "port": 8020}, "tracker": tracker})


def wandb_run(runs, name, sent=False):
    folder = runs / "artifacts/wandb/wandb" / name
    folder.mkdir(parents=True)
    if sent:
        (folder / "run-x.wandb.synced").touch()
    return folder


def test_unsent_runs_are_offline_ones_and_those_cut_short_and_not_of_running_stages(tmp_path):
    offline = wandb_run(tmp_path, "offline-run-20260101_000000-aaaa1111")
    wandb_run(tmp_path, "offline-run-20260101_000001-bbbb2222", sent=True)
    wandb_run(tmp_path, "run-20260101_000002-cccc3333")
    cut_short = wandb_run(tmp_path, "run-20260101_000003-dddd4444")
    (cut_short / dashboard.UNSENT).touch()
    wandb_run(tmp_path, "offline-run-20260101_000004-eeee5555")
    artifact = Artifact(tmp_path, "ppo", "abc")
    artifact.open()
    (artifact.checkpoints / "wandb-id.txt").write_text("eeee5555")
    with artifact.lock():
        assert dashboard.unsent(tmp_path) == [offline, cut_short]
    assert len(dashboard.unsent(tmp_path)) == 3  # the stage has ended, without a result


def test_sync_without_key_host_or_runs_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    cli.main(["sync", "experiment=smoke", f"runs={tmp_path}"])
    assert capsys.readouterr().out == f"nothing to send: no unsent W&B run in {tmp_path}/artifacts/wandb\n"
    wandb_run(tmp_path, "offline-run-20260101_000000-aaaa1111")
    with pytest.raises(UserError, match=r"^sync: no W&B key; run `wandb login` or set WANDB_API_KEY$"):
        dashboard.sync(config(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(trackers, "reachable", lambda: False)
    with pytest.raises(UserError, match=r"^sync: W&B's host does not answer"):
        dashboard.sync(config(tmp_path))


@pytest.mark.parametrize("status", [0, 1])
def test_sync_hands_the_folders_to_wandb(status, tmp_path, monkeypatch):
    folder, asked = wandb_run(tmp_path, "offline-run-20260101_000000-aaaa1111"), []
    monkeypatch.setattr(dashboard, "require_online", lambda key: None)
    done = subprocess.CompletedProcess([], status)
    monkeypatch.setattr(dashboard.subprocess, "run", lambda command: asked.append(command) or done)
    if status:
        with pytest.raises(UserError, match="sync: wandb ended with status 1"):
            dashboard.sync(config(tmp_path))
    else:
        dashboard.sync(config(tmp_path))
    assert asked == [dashboard.sync_command([folder])]


def test_wandb_takes_the_command_that_sends(tmp_path, capsys):
    """A dry run of it finds an offline run and one that was cut short online; it needs neither key nor network."""
    folders = [
        wandb_run(tmp_path, f"{kind}-20260101_000000-aaaa111{i}") for i, kind in enumerate(("offline-run", "run"))
    ]
    for folder in folders:
        (folder / f"run-{folder.name[-8:]}.wandb").touch()
    command = [*dashboard.sync_command(folders), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and all(folder.name in done.stdout + done.stderr for folder in folders)


def test_the_dashboard_is_trackios_where_there_is_its_data_and_else_the_terminals(tmp_path, monkeypatch):
    opened = []
    for name in ("trackio", "leet"):
        monkeypatch.setattr(dashboard, f"show_{name}", lambda config, store, name=name: opened.append(name))
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    dashboard.show(config(tmp_path))
    (tmp_path / "artifacts/trackio").mkdir(parents=True)
    (tmp_path / "artifacts/trackio/threefold.db").touch()
    dashboard.show(config(tmp_path))
    dashboard.show(config(tmp_path, "leet"))
    assert opened == ["leet", "trackio", "leet"]


@pytest.mark.parametrize("show", ["auto", "trackio", "leet", "tensorboard"])
def test_nothing_to_show_is_one_line(show, tmp_path, monkeypatch):
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    monkeypatch.setattr(trackers, "installed", lambda package, key: None)
    with pytest.raises(UserError, match="nothing was tracked there; make a run with tracker="):
        dashboard.show(config(tmp_path, show))


def test_the_flag_is_short_for_its_key():
    assert cli._parse(["dashboard", "run=x", "--wandb"]) == ("dashboard", ["run=x"], {"wandb": True})
    with pytest.raises(UserError, match="--wandb: is an option of dashboard, not of run"):
        cli._parse(["run", "--wandb"])


# The workspace


@pytest.mark.parametrize("stage", DESCRIBED)
def test_every_panel_shows_something_that_the_stage_tracks(stage):
    section = DESCRIBED[stage]
    shown = [name for names in section["lines"] for name in names]
    assert set(shown) <= documented(f"{stage} steps") and len(set(shown)) == len(shown)
    assert set(section.get("media", [])) <= VIEWS.get(stage, set())


def test_the_workspace_fits_the_schema_of_wandbs_public_api():
    """Built, written as the API sends it, and read again by the API's own classes; nothing is sent."""
    pytest.importorskip("wandb_workspaces")
    from wandb_workspaces.workspaces import Workspace, internal

    view = dashboard.workspace("someone", "threefold")._to_model()
    text = view.spec.model_dump_json(by_alias=True, exclude_none=True)
    again = internal.WorkspaceViewspec.model_validate_json(text)
    assert again == view.spec
    read = Workspace._from_model(view.model_copy(update={"spec": again}))
    assert [section.name for section in read.sections] == list(DESCRIBED)
    for section, (stage, described) in zip(read.sections, DESCRIBED.items(), strict=True):
        lines = [panel for panel in section.panels if hasattr(panel, "y")]
        axis = {"pretrain": "tokens", "ppo": "rollout"}.get(stage, "optimiser_step")
        assert [[str(y if isinstance(y, str) else y.name) for y in panel.y] for panel in lines] == [
            [f"{stage}/{name}" for name in names] for names in described["lines"]
        ]
        assert {str(panel.x if isinstance(panel.x, str) else panel.x.name) for panel in lines} == {f"{stage}/{axis}"}
        media = [key for panel in section.panels if hasattr(panel, "media_keys") for key in panel.media_keys]
        assert media == [f"{stage}/{name}" for name in described.get("media", [])]
    assert json.loads(text)["section"]["runSets"][0]["grouping"]


def test_the_workspace_is_made_once_and_then_brought_up_to_date(tmp_path, monkeypatch, capsys):
    workspaces = pytest.importorskip("wandb_workspaces.workspaces")
    saved, read = [], []
    monkeypatch.setattr(dashboard, "require_online", lambda key: None)
    monkeypatch.setattr(workspaces.Workspace, "save", lambda self: saved.append(self))
    monkeypatch.setattr(workspaces.Workspace, "url", "https://wandb.ai/someone/threefold?nw=abc")
    old = workspaces.Workspace(entity="someone", project="threefold", name="Renamed")
    monkeypatch.setattr(workspaces.Workspace, "from_url", lambda url: read.append(url) or old)
    for _ in range(2):
        dashboard.show(config(tmp_path, "wandb"))
    assert read == ["https://wandb.ai/someone/threefold?nw=abc"]
    assert (saved[0].name, saved[1].name) == ("Threefold", "Renamed")
    assert [len(found.sections) for found in saved] == [len(DESCRIBED)] * 2
    assert capsys.readouterr().out == "workspace: https://wandb.ai/someone/threefold?nw=abc\n" * 2


def test_trackios_page_begins_with_the_same_panels():
    order = dashboard.plot_order()
    assert order[:4] == ["ppo/score", "ppo/kl", "ppo/kl_k3", "ppo/reply_tokens"]
    assert len(order) == sum(len(names) for s in DESCRIBED.values() for names in [*s["lines"], s.get("media", [])])

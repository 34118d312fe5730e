"""Every model folder has a card that the hub can read; writing it moves no fingerprint."""

from pathlib import Path

from huggingface_hub import ModelCard
from omegaconf import OmegaConf

from threefold.chain import making
from threefold.fileio import read_json, write_json
from threefold.stages import STAGES


def test_every_model_folder_of_a_run_has_a_card(smoke):
    kinds = {"pretrain": "text-generation", "sft": "text-generation", "reward": "text-classification"}
    kinds |= {"dpo": "text-generation", "ppo": "text-generation", "ppo/critic": "text-classification"}
    artifacts = {stage: (smoke / "smoke" / stage).resolve() for stage in STAGES}
    found = {(stage, file.parent) for stage, folder in artifacts.items() for file in folder.rglob("config.json")}
    assert {str(Path(stage, folder.relative_to(artifacts[stage]))) for stage, folder in found} == set(kinds)
    for folder, kind in kinds.items():
        card = ModelCard.load(smoke / "smoke" / folder / "README.md")
        stage = folder.partition("/")[0]
        assert (card.data.library_name, card.data.license, card.data.pipeline_tag) == ("transformers", "unknown", kind)
        assert card.data.tags == ["threefold", stage]
        manifest = read_json(smoke / "smoke" / stage / "manifest.json")
        assert f"| fingerprint | {manifest['fingerprint']} |" in card.text
        assert all(f"| made from {parent} | {made} |" in card.text for parent, made in manifest["parents"].items())
        assert "| data | package:chitchat_dataset/dataset.json |" in card.text
        assert "## Limits" in card.text and "## Licence" in card.text and str(smoke) not in card.text
    metrics = read_json(smoke / "smoke/reward/metrics.json")
    assert f"| accuracy | {metrics['accuracy']:.4g} |" in (smoke / "smoke/reward/README.md").read_text()
    assert not (smoke / "smoke/comparisons/README.md").exists()


def artifact(store, stage, parents, config, metrics):
    folder = store / f"{stage}-{stage[0] * 3}"
    folder.mkdir(parents=True)
    manifest = {"stage": stage, "fingerprint": stage[0] * 3, "parents": parents}
    write_json(folder / "manifest.json", manifest)
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "config.json", {})
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    return folder, manifest


def test_a_card_names_base_and_data_of_all_that_the_model_comes_from(tmp_path):
    base = {"model": {"checkpoint": "someone/base"}, "data": {"text": {"path": "/home/someone/secret/text.jsonl"}}}
    artifact(tmp_path, "pretrain", {}, base, {})
    replies = {"data": {"replies": {"path": "someone/replies"}, "preferences": {"path": None}}}
    folder, manifest = artifact(tmp_path, "sft", {"pretrain": "ppp"}, replies, {"seconds": 3.0, "ended_share": 0.5})
    making.write_cards(folder, manifest, tmp_path)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.datasets) == ("someone/base", ["someone/replies"])
    assert "| base model | someone/base |" in card.text and "| data | text.jsonl |" in card.text
    assert "secret" not in card.text and "seconds" not in card.text and "| ended_share | 0.5 |" in card.text

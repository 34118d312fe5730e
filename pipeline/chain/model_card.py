"""The model card: README.md in every model folder, Markdown under YAML as the Hugging Face hub reads it."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from threefold.data.folders import is_local, is_package, is_task
from threefold.fileio import read_json, write_text
from threefold.tracking.values import Table, results

MADE = {
    "pretrain": "A base language model.",
    "sft": "A chat model: the base model, fine-tuned on people's replies.",
    "reward": "A reward model: it scores a reply to a prompt, higher where its comparisons say better.",
    "dpo": "A chat model: the SFT model, aligned with DPO on pairwise comparisons.",
    "ppo": "A chat model: the SFT model, aligned with PPO against a reward.",
}
LIMITS = """\
- The figures are those of one training run on held-out data of the same kind; other seeds and other data differ.
- What a judge or reward model pays for is not what people want. Look at replies before trusting a score.
- Nothing was done for safety. The model repeats what is in its data, errors and offence included.
- Nobody has looked for text of the training data that the model gives back word for word."""


def write(out: Path, manifest: dict[str, Any], store: Path) -> None:
    """Write a card into each model folder of the artifact that is being made in `out`; `store` holds its parents."""
    for file in sorted(out.rglob("config.json")):
        if manifest["stage"] in MADE:
            write_text(file.with_name("README.md"), card(file.parent.relative_to(out), out, manifest, store))


def card(part: Path, out: Path, manifest: dict[str, Any], store: Path) -> str:
    """The text of the card of the model in folder `part` of `out`."""
    from huggingface_hub import ModelCardData

    stage, configs = manifest["stage"], lineage(out, manifest, store)
    base = base_model(configs)
    scored = "reward" in (stage, out.joinpath(part).name) or part.name == "critic" or "members" in part.parts
    front = ModelCardData(
        library_name="transformers",
        license="unknown",
        pipeline_tag="text-classification" if scored else "text-generation",
        base_model=base if base and not is_local(base) and "${" not in base else None,
        datasets=[name for name, hub in data_names(configs).items() if hub] or None,
        tags=["threefold", stage],
    )
    metrics = read_json(out / "metrics.json")
    shown = results({name: value for name, value in metrics.items() if name not in MEASURED})
    return "\n".join(
        [
            f"---\n{front.to_yaml()}\n---",
            f"# {stage} {manifest['fingerprint']}{f', {part}' if part.name else ''}\n",
            f"{MADE[stage]} Made with Threefold, stage `{stage}`.\n",
            made_from(part, manifest, base, configs),
            USE.format(auto="AutoModelForSequenceClassification" if scored else "AutoModelForCausalLM"),
            "## Results\n",
            f"Of the stage; what each means is in Threefold's docs/metrics.md.\n\n{shown.markdown()}\n",
            f"## Limits\n\n{LIMITS}\n",
            "## Licence\n",
            "Unknown: it depends on those of the data and of the base model. State it before you pass the model on.\n",
        ]
    )


MEASURED = ("seconds", "peak_memory_bytes", "fingerprint", "template_hash")  # of the machine, and identities
USE = """\
## Use

    from transformers import AutoTokenizer, {auto}
    tokenizer, model = AutoTokenizer.from_pretrained(folder), {auto}.from_pretrained(folder)
"""


def made_from(part: Path, manifest: dict[str, Any], base: str | None, configs: dict[str, DictConfig]) -> str:
    """What the model was made from: parents, base, data and its key figures."""
    rows = [("fingerprint", manifest["fingerprint"])]
    rows += [(f"made from {stage}", fingerprint) for stage, fingerprint in manifest["parents"].items()]
    rows += [("base model", (Path(base).name if is_local(base) else base) if base else "none, trained from scratch")]
    rows += [("data", name) for name in data_names(configs)]
    if part.parts[:1] == ("snapshots",):
        rows += [("taken after", f"{part.name} episodes")]
    return Table(("", ""), rows).markdown() + "\n"


def lineage(out: Path, manifest: dict[str, Any], store: Path) -> dict[str, DictConfig]:
    """The configuration that each stage saw which this model comes from, itself included."""
    configs: dict[str, Any] = {manifest["stage"]: OmegaConf.load(out / "config.yaml")}
    for stage, fingerprint in manifest["parents"].items():
        folder = store / f"{stage}-{fingerprint}"
        if stage not in configs and (folder / "manifest.json").is_file():
            configs = lineage(folder, read_json(folder / "manifest.json"), store) | configs
    return configs


def base_model(configs: dict[str, DictConfig]) -> str | None:
    """The checkpoint that training started from; None where it started from nothing."""
    written: Any = OmegaConf.to_container(configs["pretrain"]) if "pretrain" in configs else {}
    return written.get("model", {}).get("checkpoint")


def data_names(configs: dict[str, DictConfig]) -> dict[str, bool]:
    """Names of the data sources behind the model, and whether each is on the hub; of local ones the last part alone."""
    on_hub = {}
    for config in configs.values():
        written: Any = OmegaConf.to_container(config)
        for source in written.get("data", {}).values():
            if path := source.get("path"):
                packaged, local = is_package(path) or is_task(path), is_local(path) or "${" in path
                on_hub[Path(path).name if local and not packaged else path] = not (packaged or local)
    return on_hub

"""Making what a configuration asks for and the store lacks, each artifact with a model card.

The model card: README.md in every model folder, Markdown under YAML as the Hugging Face hub reads it.
"""

import time
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from threefold.chain.checks import check, check_rewards, check_sources
from threefold.chain.plans import Planned, plan, view, wanted
from threefold.config import choices
from threefold.data.files import is_local, is_package, is_task
from threefold.errors import first_line, public_traceback
from threefold.execution import launch, nodes
from threefold.fileio import read_json, write_text
from threefold.stages import STAGES, parents
from threefold.tracking.trackers import Table, results


def bring_up_to_date(config: DictConfig, overrides: list[str] | None = None) -> list[str]:
    """Make what `config.target` (or the whole chain) needs and lacks; returns the stages that ran.

    overrides: what `config` is composed from, where the run is to keep it; it does once all checks have passed.
    Raises `UserError` for bad input; an unexpected error in a stage is written to its work folder and raised again.
    """
    run = Path(config.runs) / config.run
    planned, ran = plan(config, wanted(config)), []
    check(config, planned)
    if overrides is not None:
        choices.keep(config, overrides)
    with nodes.gathered(config.launch, Path(config.runs) / "artifacts") as others:
        for entry in planned.values():
            if not entry.artifact.finished and make(config, entry, planned, others):
                ran.append(entry.stage)
            entry.artifact.link_into(run)
    return ran


def keep_choices(config: DictConfig, overrides: list[str], names: list[str]) -> None:
    """Store what a run was told of which variants are made, once the data and rewards of stages `names` were read."""
    planned = plan(config, names)
    check_sources(config, planned)
    check_rewards(config, planned)
    choices.keep(config, overrides)


def make(config: DictConfig, entry: Planned, planned: dict[str, Planned], others: nodes.Nodes | None = None) -> bool:
    """Make one artifact under its lock, together with `others`; False when another process made it meanwhile."""
    artifact = entry.artifact
    artifact.folder.parent.mkdir(parents=True, exist_ok=True)
    lock = artifact.lock()
    if artifact.running:
        print(f"{entry.stage}: another process is making it; waiting for that", flush=True)
    with lock:
        if artifact.finished:
            return False
        artifact.open()
        inputs = {parent: planned[parent].artifact.folder for parent in parents(entry.stage, config)}
        try:
            _run(config, entry, inputs, others)
        except Exception as error:
            artifact.note_failure(first_line(error))
            (artifact.work / "traceback.txt").write_text(public_traceback(error))
            raise
    return True


def _run(config: DictConfig, entry: Planned, inputs: dict[str, Path], others: nodes.Nodes | None) -> None:
    started = time.time()
    execution = _execute(config, entry, inputs, others)
    manifest = {
        "stage": entry.stage,
        "fingerprint": entry.fingerprint,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(started)),
        "parts": entry.parts,
        "parents": {
            key.removeprefix("parent."): value for key, value in entry.parts.items() if key.startswith("parent.")
        },
    }
    manifest |= execution
    write_cards(entry.artifact.out, manifest, entry.artifact.folder.parent)
    entry.artifact.finish(manifest)


def _execute(config: DictConfig, entry: Planned, inputs: dict[str, Path], others: nodes.Nodes | None) -> dict[str, Any]:
    """Run the stage, in this process or in those of `launch`; returns what the manifest says of the execution."""
    stage, artifact, seen = entry.stage, entry.artifact, view(config, entry.stage)
    if config.launch.processes * config.launch.nodes > 1 and STAGES[stage].several_processes:
        folders = {parent: str(folder) for parent, folder in inputs.items()}
        places = str(artifact.out), str(artifact.checkpoints)
        task = launch.Task(
            stage,
            cast(dict[str, Any], OmegaConf.to_container(seen)),
            folders,
            *places,
            entry.fingerprint,
            **launch.place(config.launch),
        )
        return launch.run(task, artifact.work, others)
    from threefold.execution.job import Job, execute

    job = Job(stage, seen, inputs, artifact.out, artifact.checkpoints)
    if config.precision == "auto" and job.device.bf16 and job.device.type == "cpu":
        job.say(
            "precision=auto is bf16 here, as of a GPU, and torch sees none: it is slow; set fp32, or mend the driver"
        )
    return execute(job, entry.fingerprint)


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


def write_cards(out: Path, manifest: dict[str, Any], store: Path) -> None:
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

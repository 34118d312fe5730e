"""What wrong labels and few pairs cost: accuracy and calibration of the demo's reward model, for each amount of both.

The comparisons are made once, with more prompts than in the demo; each reward model then reads the first pairs of a
random order, a share of their labels exchanged. Held-out labels are clean and the same for all.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from threefold import chain
from threefold.config.compose import compose
from threefold.data import pairing, preferences
from threefold.execution.job import Job, quiet_libraries
from threefold.stages import reward

RUN = ["experiment=demo", "run=labels", "tracker=none"]
MORE = ["comparisons.prompts=4500", "comparisons.pairs_per_prompt=3", "comparisons.human_pairs=2000"]


def main() -> None:
    """Train a reward model for each number of pairs and share of wrong labels, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, nargs="+", default=[500, 2000, 8000])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.1, 0.25])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for the stage, as on the command line")
    given = parser.parse_args()
    quiet_libraries()
    made = compose([*RUN, *MORE, "comparisons.eval_prompts=600", "target=comparisons", *given.overrides])
    chain.bring_up_to_date(made)
    inputs = {name: Path(made.runs) / made.run / name for name in ("sft", "comparisons")}
    table = Table("pairs", *(f"{noise:.0%} wrong" for noise in given.noise), title="accuracy; calibration error")
    with TemporaryDirectory() as folder:
        for pairs in tqdm(given.pairs, "sizes"):
            cells = [cell(Path(folder) / f"{pairs} {noise}", inputs, pairs, noise, given) for noise in given.noise]
            table.add_row(f"{pairs:,}", *cells)
    Console(width=120).print(table)


def cell(folder: Path, inputs: dict[str, Path], pairs: int, noise: float, given: argparse.Namespace) -> str:
    """Accuracy with its interval, and expected calibration error, of one reward model."""
    noisy = folder / "comparisons"
    noisy.mkdir(parents=True)
    known = preferences.read(inputs["comparisons"], "train")
    if len(known) < pairs:
        raise SystemExit(f"{len(known):,} pairs are there, {pairs:,} are asked for: raise comparisons.prompts")
    labels, _ = pairing.with_label_noise(known, noise, np.random.default_rng(1))
    preferences.write(noisy / "train.jsonl", labels)
    preferences.write(noisy / "test.jsonl", preferences.read(inputs["comparisons"], "test"))
    config = compose([*RUN, f"reward.pairs={pairs}", *given.overrides])
    places = folder / "out", folder / "checkpoints"
    for place in places:
        place.mkdir()
    metrics = reward.run(Job("reward", config, inputs | {"comparisons": noisy}, *places))
    low, high = metrics["accuracy_ci95"]
    return f"{metrics['accuracy']:.1%} [{low:.1%}, {high:.1%}]; {metrics['calibration_error']:.3f}"


if __name__ == "__main__":
    main()

"""Every training stage, the sampler and PPO beside what one would use instead, in turn in one run.

Pretraining beside a loop in the manner of nanoGPT and a loop over the same model of transformers; SFT, reward model and
DPO beside TRL's trainers, as they are and with the settings that suit the machine best; sampling beside `generate`; PPO
beside the plain loop of bench_ppo.py, which makes the demo's models first if they are not there. All see the text of
the demo, and train from texts to a trained model: TRL's tokenising counts, and so does ours.
Command: make bench
"""

import argparse
import copy
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest import mock

import bench_ppo
import bench_sampler
import numpy as np
import torch
from datasets import Dataset
from paired import Round, clock, contest, peak_flops, show, write
from plain_loops import Loop, NanoGPT
from transformers import AutoModelForSequenceClassification, PrinterCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from threefold.config.compose import compose
from threefold.data import preferences, reading
from threefold.data.preferences import Pair
from threefold.evaluation import held_out
from threefold.execution.job import Job, quiet_libraries
from threefold.models import loading
from threefold.stages import dpo, pretrain, reward, sft
from threefold.stages import tokenizer as tokenizer_stage
from threefold.training import hf_trainer
from threefold.training.packing import PackedRows, packed

# parameters: width, width of the MLP, blocks, heads; tokens and rows of a pretraining batch
SIZES = {
    "1.3M": (128, 512, 3, 4, 128, 32),
    "3M": (192, 512, 6, 6, 256, 16),
    "30M": (512, 1408, 8, 8, 256, 8),
    "124M": (768, 2048, 12, 12, 1024, 16),
}
GPT2_VOCABULARY = 50304


class Bench:
    """The demo's text and dialogues, a tokenizer of its own, and jobs of one size."""

    def __init__(self, size: str, folder: Path, threads: int, seconds: float, rows: int):
        width, inner, layers, heads, self.context, self.batch = SIZES[size]
        self.shape = (width, layers, heads)
        self.folder, self.rows, self.numbers = folder, rows, itertools.count()
        folder.mkdir(parents=True)
        shape = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
        shape |= {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": width // heads}
        shape |= {"max_position_embeddings": max(512, self.context)}
        self.overrides = [f"model.{key}={value}" for key, value in shape.items()]
        self.overrides += [f"pretrain.context={self.context}", f"pretrain.batch_size={self.batch}"]
        self.overrides += ["experiment=demo", "tracker=none", f"runtime.threads={threads}", "run=bench"]
        self.config = compose(self.overrides)
        texts = reading.texts(reading.load(self.config.data.text, "train").rows)
        self.tokenizer = tokenizer_stage.train(texts, self.config.tokenizer.vocab_size)
        if size == "124M":
            self.tokenizer.add_tokens([f"<{i}>" for i in range(len(self.tokenizer), GPT2_VOCABULARY)])
        self.stream = packed(texts, self.tokenizer, folder / "tokens.bin")
        self.examples = reading.examples(self.config.data.replies, "train", self.config.data.dialogue)[:rows]
        replies = [example.reply for example in self.examples]
        given = zip(self.examples, replies[1:] + replies[:1], strict=True)
        self.pairs = [Pair(e.prompt, e.reply, other, 0.5, "samples") for e, other in given if e.reply != other]
        self.device = self.job("pretrain").device
        work = training_flops(self, self.context / 2) * self.batch * self.context
        self.steps = max(2, round(seconds * 0.7 * peak_flops() / work))  # of a round of pretraining

    def job(self, stage: str) -> Job:
        """A job with folders of its own; those of the round before go."""
        place = self.folder / stage / str(next(self.numbers))
        shutil.rmtree(place.parent, ignore_errors=True)
        for created in (place / "out", place / "checkpoints"):
            created.mkdir(parents=True)
        return Job(stage, self.config, {}, place / "out", place / "checkpoints")

    def model(self, seed: int = 1) -> Any:
        """A new model of this size."""
        return loading.from_scratch(self.config.model, self.tokenizer, seed)

    def classifier(self) -> Any:
        """A new reward model of this size."""
        config = copy.deepcopy(self.model().config)
        config.num_labels, config.pad_token_id = 1, self.tokenizer.pad_token_id
        return AutoModelForSequenceClassification.from_config(config)

    def policy(self) -> Any:
        """A model of this size from a folder, which DPO's trainer loads its reference from."""
        place = self.folder / "policy"
        if not place.exists():
            place.mkdir()
            loading.save(self.model(), self.tokenizer, place)
        return loading.load_policy(place)


def training_flops(bench: Bench, tokens: float) -> float:
    """Floating-point operations of training on one token with `tokens` before it on average: matrices and attention."""
    width, layers, _ = bench.shape
    return 6 * parameter_count(bench.model()) + 12 * layers * width * tokens


def parameter_count(model: Any) -> int:
    """Parameters that take part in matrix products: all but the input embeddings, unless those are the output's too."""
    total = sum(p.numel() for p in model.parameters())
    tied = getattr(model.config, "tie_word_embeddings", False)
    return total if tied else total - model.get_input_embeddings().weight.numel()


def pretraining(bench: Bench) -> dict[str, Callable[[], Round]]:
    """Tokens: the stage, nanoGPT's loop, and a plain loop over the same model of transformers."""
    stream, total = torch.from_numpy(bench.stream.astype(np.int64)), bench.steps
    width, layers, heads = bench.shape
    kind, bf16 = bench.device.type, bench.device.bf16

    def ours() -> Round:
        job, model = bench.job("pretrain"), bench.model()
        rows = PackedRows(bench.stream, bench.context, total * bench.batch)

        def work() -> float:
            pretrain.fit(job, model, rows, total)
            return total * bench.batch * bench.context

        return work

    def loop(model: Any) -> Round:
        made = Loop(model.to(kind), stream, bench.batch, bench.context, total, bf16)
        return lambda: made.run(total)

    return {
        "nanoGPT's loop": lambda: loop(NanoGPT(len(bench.tokenizer), bench.context, width, layers, heads)),
        "loop over transformers": lambda: loop(bench.model()),
        "Threefold": ours,
    }


def trl_options(bench: Bench, batch: int, **options: Any) -> dict[str, Any]:
    """Arguments of TRL: an epoch, nothing saved or reported; at its defaults but for `options`."""
    place = {"output_dir": str(bench.folder / "trl"), "num_train_epochs": 1, "use_cpu": bench.device.type == "cpu"}
    quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_strategy": "no"}
    best = {"bf16": bench.device.bf16, "gradient_checkpointing": False, "per_device_train_batch_size": batch}
    return place | quiet | ((best | options) if options else {})


def quietly(trainer: Any) -> None:
    """Train, and print nothing."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def finetuning(bench: Bench) -> dict[str, Callable[[], Round]]:
    """Examples: the stage, and TRL's SFTTrainer."""
    batch = bench.config.sft.batch_size
    rows = [{"prompt": e.prompt, "completion": [{"role": "assistant", "content": e.reply}]} for e in bench.examples]

    def ours() -> Round:
        job, model = bench.job("sft"), bench.model()

        def work() -> float:
            tokens = [sft.labelled(*ids) for ids in held_out.reply_pairs(bench.tokenizer, bench.examples)]
            order = hf_trainer.in_order([len(row["input_ids"]) for row in tokens], batch, 1, 1)
            sft.fit(job, model, bench.tokenizer, [tokens[i] for i in order], batch)
            return len(order)

        return work

    def trl(**options: Any) -> Round:
        arguments, model = SFTConfig(**trl_options(bench, batch, **options)), bench.model()

        def work() -> float:
            given = {"train_dataset": Dataset.from_list(rows), "processing_class": bench.tokenizer}
            quietly(SFTTrainer(model, arguments, **given))
            return len(rows)

        return work

    best = {"train_sampling_strategy": "group_by_length", "max_length": None}
    return {"TRL, best": lambda: trl(**best), "TRL, as it is": trl, "Threefold": ours}


def preference_rows(bench: Bench) -> list[dict[str, Any]]:
    """The pairs as TRL takes them."""
    return [
        {"prompt": p.prompt, **{k: [{"role": "assistant", "content": v}] for k, v in
                                (("chosen", p.chosen), ("rejected", p.rejected))}}
        for p in bench.pairs
    ]  # fmt: skip


def preferring(bench: Bench, stage: str) -> dict[str, Callable[[], Round]]:
    """Pairs: the stage `reward` or `dpo`, and TRL's trainer."""
    module, rows = {"reward": reward, "dpo": dpo}[stage], preference_rows(bench)
    batch, limit = bench.config[stage].batch_size, bench.config[stage].max_length
    made = bench.classifier if stage == "reward" else bench.policy

    def ours() -> Round:
        job, model = bench.job(stage), made()

        def work() -> float:
            pairs = preferences.tokenised(bench.tokenizer, bench.pairs, limit)
            order = hf_trainer.in_order(pairs.lengths(), batch, 1, 1)
            module.fit(job, model, bench.tokenizer, pairs.take(order), batch)
            return len(order)

        return work

    def trl(**options: Any) -> Round:
        config, trainer = {"reward": (RewardConfig, RewardTrainer), "dpo": (DPOConfig, DPOTrainer)}[stage]
        arguments, model = config(**trl_options(bench, batch, **options)), made()

        def work() -> float:
            given = {"train_dataset": Dataset.from_list(rows), "processing_class": bench.tokenizer}
            quietly(trainer(model, args=arguments, **given))
            return len(rows)

        return work

    best = {"max_length": limit} | ({"precompute_ref_log_probs": True} if stage == "dpo" else {})
    return {"TRL, best": lambda: trl(**best), "TRL, as it is": trl, "Threefold": ours}


def without_checkpoints(*given: Any, made: Any = hf_trainer.arguments, **options: Any) -> dict[str, Any]:
    """The stages' arguments for a Trainer, which then writes no checkpoint, as the others write none."""
    return made(*given, **options) | {"save_strategy": "no"}


def equal_loss(bench: Bench, steps: int) -> None:
    """CPU time that nanoGPT's loop takes for so many steps, and ours to come to the same held-out loss."""
    held = reading.texts(reading.load(bench.config.data.text, "test").rows)
    rows = PackedRows(packed(held, bench.tokenizer, bench.folder / "held.bin"), bench.context)
    ids = torch.stack([rows[i]["input_ids"] for i in range(min(64, len(rows)))])
    stream, (width, layers, heads) = torch.from_numpy(bench.stream.astype(np.int64)), bench.shape
    plain = NanoGPT(len(bench.tokenizer), bench.context, width, layers, heads)
    loop = Loop(plain, stream, bench.batch, bench.context, steps, False)
    started = clock()
    loop.run(steps)
    taken = clock() - started
    with torch.no_grad():
        wanted = plain(ids[:, :-1], ids[:, 1:]).item()
    print(f"nanoGPT's loop: {steps} steps, {taken:.0f} s, held-out loss {wanted:.4f} nats per token")
    for share in (0.2, 0.3, 0.4, 0.5, 0.7, 1.0):
        job, model, some = bench.job("pretrain"), bench.model(), round(share * steps)
        started = clock()
        pretrain.fit(job, model, PackedRows(bench.stream, bench.context, some * bench.batch), some)
        ours = clock() - started
        with torch.no_grad():
            reached = model.eval()(input_ids=ids, labels=ids, use_cache=False).loss.item()
        print(f"Threefold: {some} steps, {ours:.0f} s, held-out loss {reached:.4f}: {taken / ours:.2f} times as fast")
        if reached <= wanted:
            return


WORKS = ("pretrain", "sft", "reward", "dpo", "sampler", "ppo")


def contests_of(bench: Bench, size: str, works: list[str], rounds: int) -> dict[str, list[Any]]:
    """The contests of one size, each shown when it is done."""
    made = {}
    for work in works:
        flops, unit, baseline = None, {"sft": "examples"}.get(work, "pairs"), "TRL, best"
        if work == "pretrain":
            ways, unit, baseline = pretraining(bench), "tokens", "nanoGPT's loop"
            flops = training_flops(bench, bench.context / 2)
        else:
            ways = finetuning(bench) if work == "sft" else preferring(bench, work)
        with mock.patch.object(hf_trainer, "arguments", without_checkpoints):
            entries = contest(ways, rounds, baseline, flops)
        show(f"{work}, {size}", unit, baseline, entries)
        made[f"{work}, {size}"] = entries
    return made


def main() -> None:
    """Every contest that is asked for; tables on the terminal, and all numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--works", nargs="*", default=list(WORKS), choices=WORKS)
    parser.add_argument("--sizes", nargs="+", default=None, choices=list(SIZES), help="all but 124M without a GPU")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each way, after one that warms up")
    parser.add_argument("--seconds", type=float, default=8.0, help="about what a round of pretraining takes")
    parser.add_argument("--rows", type=int, default=128, help="examples and pairs of a round of the other stages")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--equal-loss", type=int, metavar="STEPS", help="also the time to the loss of so many steps")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    given = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    quiet_libraries()
    sizes = given.sizes or ["1.3M", "30M", *(["124M"] if torch.cuda.is_available() else [])]
    made, folder = {}, Path(mkdtemp())
    try:
        for size in sizes:
            bench = Bench(size, folder / size, given.threads, given.seconds, given.rows)
            trained = [work for work in given.works if work not in ("sampler", "ppo")]
            made |= contests_of(bench, size, trained, given.rounds)
            if given.equal_loss:
                equal_loss(bench, given.equal_loss)
        if "sampler" in given.works:
            made |= bench_sampler.contests(given.rounds)
        if "ppo" in given.works:
            made |= bench_ppo.contests(folder / "ppo", given.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    write(given.out, made, {name: getattr(given, name) for name in ("rounds", "seconds", "rows")})


if __name__ == "__main__":
    main()

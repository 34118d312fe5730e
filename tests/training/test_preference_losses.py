"""Losses of stage `dpo`, as TRL computes them with our arguments, against formulas written out here."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import PAIRS, make_job, perturb, plain_logprobs, tiny_policy, tiny_tokenizer

from threefold.config.checks import check_shares
from threefold.config.compose import compose
from threefold.data import preferences
from threefold.errors import UserError
from threefold.fileio import read_lines
from threefold.schema.stages import BETAS, LABEL_LOSSES, PAIR_LOSSES
from threefold.stages import dpo
from threefold.training import hf_trainer

BETA, NOISE, TAU = 0.3, 0.1, 0.05


def tokenised(pairs=PAIRS) -> preferences.TokenisedPairs:
    return preferences.tokenised(tiny_tokenizer(), pairs, 512)


@pytest.fixture
def trainer_of(tmp_path, monkeypatch):
    """The trainer that `fit` is about to train with; its model is changed after the reference's log-probabilities."""

    def build(data, *options, start=0.0, change=0.1):
        built, model = [], tiny_policy()
        perturb(model, start)
        monkeypatch.setattr(hf_trainer, "train", lambda trainer, *_: built.append(trainer))
        size = len(data.rows)
        job = make_job("dpo", tmp_path / str(len(built)), f"dpo.batch_size={size}", f"dpo.beta={BETA}", *options)
        dpo.fit(job, model, tiny_tokenizer(), data, size)
        perturb(model, change)
        return built[0]

    return build


def loss_of(trainer) -> float:
    return trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).item()


def in_double(model):
    """A model of its own with the weights of `model`."""
    twin = tiny_policy()
    twin.load_state_dict(model.state_dict())
    return twin.double()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


class PlainPair:
    """Log-probabilities of one pair, one unpadded row at a time and in double precision: sums, means and changes."""

    def __init__(self, model, reference, row, tail: float = 1.0):
        sides = row["chosen_ids"], row["rejected_ids"]
        shared = min(map(len, sides))
        values = [[plain_logprobs(m, row["prompt_ids"], ids) for ids in sides] for m in (model, reference)]
        self.tokens = values[0]
        (c, r), (rc, rr) = ([(v[:shared].sum() + tail * v[shared:].sum()).item() for v in pair] for pair in values)
        self.chosen, self.rejected, self.delta = c - rc, r - rr, c - rc - r + rr
        self.ratio, self.reference_ratio = c - r, rc - rr
        self.mean_delta = self.chosen / len(sides[0]) - self.rejected / len(sides[1])


def pair_loss(kind: str, p: PlainPair) -> float:
    """The loss of one pair; source by source in docs/dpo.md."""
    x, c, r = BETA * p.delta, BETA * p.chosen, BETA * p.rejected
    ls = lambda value: math.log(sigmoid(value))  # noqa: E731
    return {
        "sigmoid": lambda: -ls(x),
        "hinge": lambda: max(0.0, 1 - x),
        "ipo": lambda: (p.mean_delta - 1 / (2 * BETA)) ** 2,
        "robust": lambda: (-(1 - NOISE) * ls(x) + NOISE * ls(-x)) / (1 - 2 * NOISE),
        "sigmoid_norm": lambda: -ls(BETA * p.mean_delta),
        "apo_zero": lambda: 1 - sigmoid(c) + sigmoid(r),
        "apo_down": lambda: sigmoid(c) + 1 - sigmoid(c - r),
        "exo_pair": lambda: sigmoid(x) * (ls(x) - math.log(1 - NOISE)) + sigmoid(-x) * (ls(-x) - math.log(NOISE)),
        "nca_pair": lambda: -ls(c) - 0.5 * ls(-c) - 0.5 * ls(-r),
        "bco_pair": lambda: -ls(c) - ls(-r),
        "sppo_hard": lambda: (p.chosen - 0.5 / BETA) ** 2 + (p.rejected + 0.5 / BETA) ** 2,
        "discopop": lambda: -ls(x) * (1 - sigmoid(x / TAU)) + math.exp(-x) * sigmoid(x / TAU),
    }[kind]()


def plain_loss(kind: str, pairs: list[PlainPair]) -> float:
    """The loss of a batch."""
    if kind == "sft":
        return -torch.cat([p.tokens[0] for p in pairs]).mean().item()
    if kind.startswith("aot"):
        better = sorted(p.ratio if kind == "aot" else p.chosen for p in pairs)
        worse = sorted(p.reference_ratio if kind == "aot" else p.rejected for p in pairs)
        gaps = [BETA * (a - b) for a, b in zip(better, worse, strict=True)]
        return sum(-(1 - NOISE) * math.log(sigmoid(x)) - NOISE * math.log(sigmoid(-x)) for x in gaps) / len(pairs)
    return sum(pair_loss(kind, p) for p in pairs) / len(pairs)


def test_every_loss_of_pairs_and_their_weighted_sum(trainer_of):
    weights = {kind: 0.5 + 0.25 * i for i, kind in enumerate(PAIR_LOSSES) if kind != "sigmoid"}
    given = ", ".join(f"{kind}: {weight}" for kind, weight in weights.items())
    trainer = trainer_of(tokenised(), f"dpo.label_smoothing={NOISE}", f"dpo.loss_weights={{{given}}}")
    model, reference = in_double(trainer.model), tiny_policy().double()
    pairs = [PlainPair(model, reference, row) for row in tokenised().rows]
    expected = {kind: plain_loss(kind, pairs) for kind in PAIR_LOSSES}
    total = sum(weights.get(kind, 1.0) * loss for kind, loss in expected.items())
    assert loss_of(trainer) == pytest.approx(total, rel=1e-4)
    for kind, loss in expected.items():
        trainer.loss_types, trainer.loss_weights = [kind], [1.0]
        assert loss_of(trainer) == pytest.approx(loss, rel=1e-3, abs=1e-5), kind
    assert len({round(loss, 4) for loss in expected.values()}) == len(PAIR_LOSSES)  # none stands for another


def test_simpo_has_a_margin_and_no_reference(trainer_of):
    trainer = trainer_of(tokenised(), "dpo.loss_type=simpo", "dpo.simpo_gamma=0.7", "dpo.loss_weights={sft: 0.5}")
    model, losses, nll = in_double(trainer.model), [], []
    for row in tokenised().rows:
        chosen, rejected = (plain_logprobs(model, row["prompt_ids"], row[f"{s}_ids"]) for s in ("chosen", "rejected"))
        losses.append(-math.log(sigmoid(BETA * (chosen.mean() - rejected.mean()).item() - 0.7)))
        nll.append(-chosen)
    expected = sum(losses) / len(losses) + 0.5 * torch.cat(nll).mean().item()
    assert loss_of(trainer) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("kind", "count"), [(["dpo.loss_type=simpo", "dpo.simpo_gamma=0.7"], 0), (["seed=1"], 4)])
def test_simpo_logs_no_rewards_against_its_margin(kind, count, trainer_of):
    trainer, logs = trainer_of(tokenised(), *kind), {}
    loss_of(trainer)
    trainer.log(logs)
    assert sum("rewards/" in name for name in logs) == count and "logps/chosen" in " ".join(logs)


def test_the_beta_of_another_loss_is_said():
    betas = {kind: SimpleNamespace(loss_type=kind, beta=0.1) for kind in BETAS}
    assert {kind for kind, config in betas.items() if dpo.unusual_beta(config)} == {
        "robust", "nca_pair", "bco_pair", "sppo_hard", "sigmoid_norm", "simpo",
    }  # fmt: skip
    assert not any(dpo.unusual_beta(SimpleNamespace(loss_type=kind, beta=None)) for kind in BETAS)


def test_mismatched_replies_are_to_other_prompts():
    rows = [
        {"prompt_ids": [prompt], "completion_ids": [reply]} for reply, prompt in enumerate([1, 1, 2, 2, 3, 3, 3, 3])
    ]
    assert [row["KL_completion_ids"] for row in dpo.with_mismatched(rows, 4)] == [
        [3], [3], [1], [1], [7], [4], [5], [6],  # the second step has one prompt alone
    ]  # fmt: skip


def test_ld_alpha_weighs_the_tokens_by_which_a_reply_is_longer(trainer_of):
    trainer = trainer_of(tokenised(), "dpo.ld_alpha=0.4")
    model, reference = in_double(trainer.model), tiny_policy().double()
    losses = {
        tail: plain_loss("sigmoid", [PlainPair(model, reference, row, tail) for row in tokenised().rows])
        for tail in (0.4, 1.0)
    }
    assert loss_of(trainer) == pytest.approx(losses[0.4], rel=1e-4)
    assert abs(losses[0.4] - losses[1.0]) > 0.01


def test_sft_is_a_mean_over_the_tokens_of_an_optimiser_step_however_it_is_split(tmp_path):
    rows, steps = tokenised(PAIRS * 2), {}
    for micro in ("null", "2"):
        options = ["dpo.batch_size=8", f"runtime.micro_batch_size={micro}", "dpo.loss_weights={sft: 0.5}"]
        job = make_job("dpo", tmp_path / micro, *options)
        dpo.fit(job, tiny_policy(), tiny_tokenizer(), rows, 8)
        steps[micro] = read_lines(job.out / "log.jsonl")[0]
    model = tiny_policy().double()
    logprobs = [plain_logprobs(model, row["prompt_ids"], row["chosen_ids"]) for row in rows.rows]
    expected = math.log(2) - 0.5 * torch.cat(logprobs).mean().item()
    assert abs(expected - math.log(2) + 0.5 * torch.stack([v.mean() for v in logprobs]).mean().item()) > 0.01
    assert steps["null"]["loss"] == pytest.approx(expected, rel=1e-4)
    assert steps["2"]["loss"] == pytest.approx(expected, rel=1e-4)
    assert steps["2"]["grad_norm"] == pytest.approx(steps["null"]["grad_norm"], rel=1e-3)


# Replies labelled one by one


def plain_kto(kind: str, model, reference, rows, good: float, bad: float) -> tuple[float, float]:
    """KTO's loss (Ethayarajh et al. 2024, eq. 7 and 8) and its KL: the last reply to a prompt answers the next prompt.

    Each prompt has two rows, one after the other.
    """

    def change(prompt: list[int], reply: list[int]) -> float:
        return (plain_logprobs(model, prompt, reply).sum() - plain_logprobs(reference, prompt, reply).sum()).item()

    matched = [change(row["prompt_ids"], row["completion_ids"]) for row in rows]
    shifted = [change(row["prompt_ids"], rows[i - i % 2 - 1]["completion_ids"]) for i, row in enumerate(rows)]
    kl = max(0.0, sum(shifted) / len(rows)) if kind == "kto" else 0.0
    signs = [1 if row["label"] else -1 for row in rows]
    losses = [
        (good if sign > 0 else bad) * (1 - sigmoid(BETA * sign * (moved - kl)))
        for sign, moved in zip(signs, matched, strict=True)
    ]
    return sum(losses) / len(losses), kl


@pytest.mark.parametrize(("kind", "falls"), [("kto", False), ("kto", True), ("apo_zero_unpaired", False)])
def test_losses_of_labelled_replies(trainer_of, kind, falls):
    """Noise makes replies less likely, and the KL is cut at 0; its removal makes them likelier, and it is not."""
    replies, given = dpo.replies_of(tokenised()), ["dpo.desirable_weight=1.5", "dpo.undesirable_weight=0.7"]
    start, change = (0.0, 0.1) if falls else (0.1, -0.1)
    trainer = trainer_of(replies, f"dpo.loss_type={kind}", *given, start=start, change=change)
    reference = tiny_policy()
    perturb(reference, start)
    expected, kl = plain_kto(kind, in_double(trainer.model), reference.double(), replies.rows, 1.5, 0.7)
    assert loss_of(trainer) == pytest.approx(expected, rel=1e-4)
    assert trainer._metrics["eval"]["kl"] == [pytest.approx(kl, rel=1e-3)]
    assert (kl > 0.1) == (kind == "kto" and not falls)


def test_pairs_are_two_replies_each_and_labelled_replies_are_there_once():
    pairs = tokenised()
    rows = dpo.replies_of(pairs).rows
    assert [row["label"] for row in rows] == [True, False] * len(PAIRS)
    assert (
        rows[3]["prompt_ids"] == pairs.rows[1]["prompt_ids"]
        and rows[3]["completion_ids"] == pairs.rows[1]["rejected_ids"]
    )
    labelled = [(pair.prompt, pair.rejected, i == 0) for i, pair in enumerate(PAIRS)]
    matched = tokenised(preferences.matched(labelled, seed=1))
    assert len(matched.rows) == 3 and sorted(row["label"] for row in dpo.replies_of(matched).rows) == [False] * 3 + [
        True
    ]


# A reference that moves


def test_a_reference_that_moves_is_half_way_to_the_policy_every_second_step(tmp_path):
    options = ["dpo.batch_size=4", "dpo.reference_sync_every=2", "dpo.reference_mixup=0.5", "dpo.learning_rate=0.003"]
    job = make_job("dpo", tmp_path, *options, "dpo.warmup=0", f"dpo.beta={BETA}")
    steps, pairs = 5, tokenised(PAIRS * 5)
    dpo.fit(job, tiny_policy(), tiny_tokenizer(), pairs, 4, tiny_policy())
    model, reference, losses = tiny_policy().double(), tiny_policy().double(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.003 * (1 - step / steps)
        margins = []
        for row in pairs.rows[4 * step : 4 * step + 4]:
            change = [
                logprob(model, row, side) - logprob(reference, row, side).detach() for side in ("chosen", "rejected")
            ]
            margins.append(change[0] - change[1])
        loss = torch.nn.functional.softplus(-BETA * torch.stack(margins)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 2:
            with torch.no_grad():
                for kept, moved in zip(reference.parameters(), model.parameters(), strict=True):
                    kept.copy_(0.5 * kept + 0.5 * moved)
    assert [row["loss"] for row in read_lines(job.out / "log.jsonl")] == pytest.approx(losses, rel=1e-3)


def logprob(model, row, side: str) -> torch.Tensor:
    prompt, reply = row["prompt_ids"], row[f"{side}_ids"]
    logits = model(input_ids=torch.tensor([prompt + reply]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(reply)), reply].sum()


def test_a_resumed_training_goes_on_with_the_reference_that_had_moved(tmp_path):
    options = ["dpo.batch_size=4", "dpo.reference_sync_every=1", "dpo.learning_rate=0.003", "runtime.checkpoints=1"]
    job, pairs = make_job("dpo", tmp_path, *options), tokenised(PAIRS * 4)
    whole = dpo.fit(job, tiny_policy(), tiny_tokenizer(), pairs, 4, tiny_policy()).state_dict()
    weights = {name: tensor.clone() for name, tensor in whole.items()}
    shutil.rmtree(job.checkpoints / "checkpoint-4")  # as if killed after the checkpoint of step 2
    resumed = dpo.fit(job, tiny_policy(), tiny_tokenizer(), pairs, 4, tiny_policy()).state_dict()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())
    assert [row["step"] for row in read_lines(job.out / "log.jsonl")] == [1, 2, 3, 4]


# Combinations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["dpo.loss_weights={kto: 1}"], "dpo.loss_weights: kto is no loss of pairs"),
        (["dpo.loss_weights={sft: 0}"], r"dpo.loss_weights.sft=0.0: must be a finite number above 0"),
        (["dpo.loss_type=kto", "dpo.loss_weights={sft: 1}"], "dpo.loss_weights: dpo.loss_type=kto is no loss of pairs"),
        (["dpo.beta=0"], "dpo.beta=0: dpo.loss_type=sigmoid learns nothing"),
        (["dpo.loss_type=exo_pair"], "dpo.label_smoothing=0: exo_pair"),
        (["dpo.label_smoothing=0.1"], "dpo.label_smoothing: dpo.loss_type=sigmoid has none"),
        (["dpo.loss_type=sigmoid_norm", "dpo.ld_alpha=0.5"], "dpo.ld_alpha: is for losses on sums over tokens"),
        (["dpo.loss_type=kto", "dpo.ld_alpha=0.5"], "dpo.ld_alpha: is for losses on sums"),
        (["dpo.loss_type=orpo"], "dpo.loss_type=orpo: TRL has ORPO among its experiments alone"),
        (["dpo.loss_type=simpo"], "dpo.simpo_gamma: goes with dpo.loss_type=simpo"),
        (
            ["dpo.loss_type=simpo", "dpo.simpo_gamma=1", "dpo.reference_sync_every=4"],
            "dpo.loss_type=simpo has no refer",
        ),
        (["dpo.loss_type=simpo", "dpo.simpo_gamma=1", "dpo.loss_weights={ipo: 1}"], "takes sft alone beside it"),
        (["dpo.desirable_weight=2"], "dpo.desirable_weight, dpo.undesirable_weight: are for kto"),
        (
            ["dpo.loss_type=kto", "dpo.desirable_weight=0", "dpo.undesirable_weight=0"],
            "dpo.desirable_weight=0: with dpo.undesirable_weight=0",
        ),
        (["dpo.reference_mixup=0.5"], "dpo.reference_mixup: is for a reference that moves"),
        (["dpo.reference_sync_every=4", "dpo.reference_mixup=0"], "dpo.reference_mixup=0: the reference would stay"),
    ],
)
def test_options_that_a_loss_does_not_have_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        compose(["experiment=smoke", *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["dpo.loss_type=kto", "runtime.micro_batch_size=2"], "runtime.micro_batch_size=2: kto looks at the 4 rows"),
        (["dpo.loss_type=kto", "launch=ddp", "launch.processes=4"], "dpo.batch_size=4: kto needs 2 replies or more"),
        (["dpo.loss_weights={aot: 1}", "launch=ddp", "launch.processes=2"], "launch.processes: aot sorts the pairs"),
        (
            ["dpo.reference_sync_every=4", "launch=fsdp2", "launch.processes=2"],
            "dpo.reference_sync_every: launch.mode=",
        ),
    ],
)
def test_what_a_loss_needs_in_one_pass_or_process_is_not_split(options, message):
    with pytest.raises(UserError, match=message):
        check_shares(compose(["experiment=smoke", *options]), ["dpo"])
    check_shares(compose(["experiment=smoke", "dpo.loss_type=kto", "launch=ddp", "launch.processes=2"]), ["dpo"])


def test_beta_is_that_of_the_loss_where_it_is_null():
    assert set(BETAS) == {*PAIR_LOSSES, *LABEL_LOSSES, "simpo"}
    config = compose(["experiment=smoke", "dpo.loss_type=sigmoid_norm", "dpo.beta=null"]).dpo
    assert dpo.beta_of(config) == 5.0 and dpo.beta_of(compose(["experiment=smoke", "dpo.beta=0.2"]).dpo) == 0.2

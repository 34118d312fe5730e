"""Stage `reward`: a reward model on pairwise comparisons with TRL's RewardTrainer, and its check-up."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import DataCollatorWithPadding, Trainer
from trl import RewardConfig, RewardTrainer

from threefold.columns import Message
from threefold.data import preferences
from threefold.data.preferences import Pair, TokenisedPairs
from threefold.errors import UserError
from threefold.evaluation import checkup
from threefold.execution.device import Work
from threefold.execution.job import Job
from threefold.models import chat, ensemble, likelihood, loading, lora
from threefold.models.ensemble import Ensemble
from threefold.sampling import sampler
from threefold.training import hf_trainer
from threefold.training.hf_trainer import load_pairs


def run(job: Job) -> dict[str, Any]:
    """Train from the SFT model, normalise the scores on its samples, and check the model up on held-out pairs."""
    config = job.config.reward
    tokenizer = chat.require_same_template({"sft": job.inputs["sft"]})
    train, test = load_pairs(job, tokenizer)
    require_margins(config, train)
    hf_trainer.require_whole_batch(job, len(train.rows), config.batch_size)
    batch_size = hf_trainer.rows_of_a_batch(config.batch_size, len(train.rows))
    orders = [
        hf_trainer.in_order(train.lengths(), batch_size, config.epochs, member_seed(job, number))
        for number in range(config.ensemble)
    ]
    counted = hf_trainer.trained_on(job, orders, len(train.rows), batch_size, "pairs")
    announce(job, [train.take(order) for order in orders], batch_size, test)
    samples = sft_samples(job, tokenizer, test.pairs) if job.main else []
    unseen = hf_trainer.held_out_rows(job, test.rows, len(orders[0]))
    members = [
        member(job, i, tokenizer, train.take(order), batch_size, samples, unseen) for i, order in enumerate(orders)
    ]
    if not job.main:
        return {}
    model = combined(job, members, tokenizer, samples)
    with torch.autocast(job.device.type, torch.bfloat16, enabled=job.device.bf16):  # as PPO will score
        checked = check_up(job, model, tokenizer, train.pairs, test)
    if job.tracked:
        job.show(checkup.views(checked))
    checked |= counted
    return checked | {
        "score_mean": members[0].config.score_mean,
        "score_std": members[0].config.score_std,
        "dropped_too_long": train.dropped + test.dropped,
        "template_hash": chat.template_hash(tokenizer),
    }


def require_margins(config: Any, train: TokenisedPairs) -> None:
    """Raise `UserError` where `reward.margin_coef` asks for a gap that pairs do not have."""
    missing = sum(pair.gap is None for pair in train.pairs)
    if config.margin_coef and train.unpaired:
        raise UserError("reward.margin_coef: replies that were labelled one by one have no margin; set it to 0")
    if config.margin_coef and missing:
        raise UserError(
            f"reward.margin_coef={config.margin_coef:g}: {missing} pairs have no gap (people compared them, or the "
            "data has no margin); set it to 0"
        )


def announce(job: Job, ordered: list[TokenisedPairs], batch_size: int, test: TokenisedPairs) -> None:
    """One line: device, batch, and the time of sampling, of training all members, and of the check-up."""
    config, limits = job.config.reward, job.config.sampling
    steps, tokens = len(ordered[0].rows) // batch_size, sum(pairs.tokens() for pairs in ordered)
    length = test.tokens() // 2 // len(test.rows)
    scored = config.ensemble * sequences_checked(config, test) * length
    sampled = len(_prompts(test.pairs)) * limits.max_new_tokens
    work = Work(tokens, scored, sampled, (2 * batch_size, length), limits.batch_size)
    policy = loading.load_policy(job.inputs["sft"], job.device.type)  # as fast as the model with a score head
    job.announce(f"{tokens // steps // config.ensemble:,} tokens", steps * config.ensemble, policy, work)


def sequences_checked(config: Any, test: TokenisedPairs) -> int:
    """How many sequences the check-up scores: both replies of each pair, the probes beside a reply, and some thrice."""
    probed = min(config.probe_prompts, len({str(pair.prompt) for pair in test.pairs}))
    return 2 * len(test.rows) + (1 + len(checkup.PROBE_NAMES)) * probed + 3 * min(checkup.COMPARED, len(test.rows))


def member(
    job: Job, number: int, tokenizer: Any, ordered: TokenisedPairs, batch_size: int, samples: list[list[int]],
    held_out: Any = None,
) -> Any:  # fmt: skip
    """The `number`-th model of the ensemble, with its own head and order of pairs; a finished one is read."""
    out = member_folder(job, number)
    done = job.checkpoints / str(number) / "done"
    if done.exists():
        return loading.load_reward_model(out, job.device.type)
    model = with_score_head(job, tokenizer, member_seed(job, number))
    model = fit(job, model, tokenizer, ordered, batch_size, number, held_out).eval()
    if job.main:
        normalise(model, tokenizer, samples)
        loading.save(model, tokenizer, out)
        done.touch()
    return model


def member_folder(job: Job, number: int) -> Path:
    """Where the `number`-th model of the ensemble is saved: the first is the artifact itself."""
    return job.out / ensemble.MEMBERS / str(number + 1) if number else job.out


def member_seed(job: Job, number: int) -> int:
    """The seed of a model's head and of the order of its pairs; that of the first is the stage's."""
    seed = job.config.reward.seed
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0]) if number else seed


def with_score_head(job: Job, tokenizer: Any, seed: int) -> Any:
    """The SFT model with a linear score in place of its output layer, initialised with std 1/sqrt(width + 1).

    Source of the initialisation: Huang et al. 2024, arXiv 2403.17031, detail 8. Dropout is off in every model here.
    """
    torch.manual_seed(seed)
    model: Any = loading.with_new_head(job.inputs["sft"])
    torch.nn.init.normal_(model.score.weight, std=(model.config.hidden_size + 1) ** -0.5)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


class SmoothedTrainer(hf_trainer.Undisturbed, RewardTrainer):
    """TRL's loss as if a share `smoothing` of the labels were wrong (Mitchell 2023, on DPO with noisy labels).

    (1 - e) softplus(-d) + e softplus(d) is softplus(-d) + e d, with d the score of the chosen reply less that of the
    rejected one: TRL's loss and a term that is added to it here.
    """

    smoothing = 0.0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one batch, with the model's outputs where these are asked for."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        chosen, rejected = outputs.logits[:, 0].chunk(2)  # [B] scores each, of B pairs
        loss = loss + self.smoothing * (chosen - rejected).mean()
        return (loss, outputs) if return_outputs else loss


def fit(
    job: Job, model: Any, tokenizer: Any, train: TokenisedPairs, batch_size: int, number: int = 0, held_out: Any = None
) -> Any:
    """Train with TRL on rows that are already tokenised; LoRA adapters are merged, and left in adapter/ as well.

    The loss is measured on rows that are `held_out`, where there are any.
    """
    config, folder = job.config.reward, job.checkpoints / str(number)
    steps = len(train.rows) // batch_size
    arguments = RewardConfig(
        **hf_trainer.arguments(job, batch_size, steps, member_seed(job, number), folder),
        **hf_trainer.linear_schedule(config.learning_rate, config.warmup, steps),
        gradient_checkpointing=False,
        center_rewards_coefficient=config.center_coef or None,
        max_length=None,
    )
    peft_config = None
    if config.lora_rank is not None:
        options = {"modules_to_save": ["score"], "task_type": "SEQ_CLS"}
        peft_config = lora.adapter_config(model, config.lora_rank, config.lora_alpha, **options)
    if train.unpaired:
        classifier = model if peft_config is None else get_peft_model(model, peft_config)
        trainer = classifier_trainer(job, classifier, tokenizer, train, arguments, held_out)
    else:
        trainer = SmoothedTrainer(
            model, arguments, train_dataset=columns(train, config), processing_class=tokenizer, peft_config=peft_config,
            eval_dataset=Dataset.from_list([side_by_side(row) for row in held_out]) if held_out else None,
        )  # fmt: skip
        trainer.smoothing = config.label_smoothing
    trained: Any = hf_trainer.train(trainer, job, batch_size, "pairs", number * steps)
    if peft_config is None:
        return trained
    if job.main:
        trained.save_pretrained(member_folder(job, number) / "adapter")
    return trained.merge_and_unload()


class Classifier(hf_trainer.Undisturbed, Trainer):
    """A Trainer, undisturbed by what is measured."""


def classifier_trainer(
    job: Job, model: Any, tokenizer: Any, train: TokenisedPairs, arguments: RewardConfig, held_out: Any = None
) -> Trainer:
    """A Trainer for replies that were labelled one by one: cross-entropy of good and bad, the score being the logit.

    A batch has the good and the bad reply of each of its pairs; with `label_smoothing` e the targets are 1 - e and e.
    """
    config = job.config.reward
    targets = 1 - config.label_smoothing, config.label_smoothing

    def labelled(rows: Any) -> Dataset:
        return Dataset.from_list([
            {"input_ids": ids, "labels": [target]}
            for row in rows
            for ids, target in zip(preferences.sequences(row), targets, strict=True)
        ])  # fmt: skip

    arguments.per_device_train_batch_size *= 2
    model.config.problem_type = "multi_label_classification"  # transformers' name for this loss
    collator = DataCollatorWithPadding(tokenizer)
    measured = labelled(held_out) if held_out else None
    trainer = Classifier(
        model, arguments, train_dataset=labelled(train.rows), eval_dataset=measured, data_collator=collator
    )
    trainer.model_accepts_loss_kwargs = False  # the model's loss is a mean over rows: the Trainer divides it by passes
    return trainer


def columns(train: TokenisedPairs, config: Any) -> Dataset:
    """The rows as TRL reads them; with `margin_coef` the gap of each pair asks for that much of a score gap."""
    rows = [side_by_side(row) for row in train.rows]
    if config.margin_coef:
        rows = [row | {"margin": config.margin_coef * pair.gap} for row, pair in zip(rows, train.pairs, strict=True)]
    return Dataset.from_list(rows)


def side_by_side(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """Both replies of a pair, each with its prompt, as TRL reads them."""
    return dict(zip(("chosen_ids", "rejected_ids"), preferences.sequences(row), strict=True))


def sft_samples(job: Job, tokenizer: Any, test: list[Pair]) -> list[list[int]]:
    """Held-out prompts with a sample of the SFT model each, in token ids: what scores are normalised on."""
    policy = loading.load_policy(job.inputs["sft"], job.device.type)
    prompts = [chat.prompt_ids(tokenizer, prompt) for prompt in _prompts(test)]
    prompts = [prompts[i] for i in sampler.with_room(prompts, policy, job.config.sampling)]
    if len(prompts) < 2:
        raise UserError(
            "reward: scores are normalised on samples for held-out prompts, and there is one; give more pairs"
        )
    numbers = sampler.random_numbers(job.config.reward.seed, len(prompts), job.config.sampling)
    bar = job.progress(len(prompts), "samples", part="samples")
    replies = sampler.sample(policy, prompts, job.config.sampling, tokenizer, numbers, bar)
    bar.close()
    ended = [chat.with_own_end(tokenizer, reply.ids) for reply in replies]
    return [prompt + reply for prompt, reply in zip(prompts, ended, strict=True)]


def _prompts(test: list[Pair]) -> list[list[Message]]:
    """The different prompts of held-out pairs that scores are normalised on."""
    return list({str(pair.prompt): pair.prompt for pair in test}.values())[:NORMALISED_ON]


NORMALISED_ON = 256  # prompts


def normalise(model: Any, tokenizer: Any, samples: list[list[int]]) -> None:
    """Store mean and spread of the scores of the SFT model's samples in the model's configuration."""
    scores = torch.tensor(likelihood.scores(model, samples, tokenizer.pad_token_id))
    model.config.score_mean, model.config.score_std = ensemble.mean_and_deviation(scores)


def combined(job: Job, members: list[Any], tokenizer: Any, samples: list[list[int]]) -> Ensemble:
    """The members as one reward model; how they are combined goes into the configuration of the first."""
    config = job.config.reward
    if len(members) > 1:
        model = Ensemble(members, config.combine, config.combine_coef)
        model.scale = ensemble.mean_and_deviation(model.scores(samples, tokenizer.pad_token_id))
        members[0].config.ensemble = model.settings()
        loading.save(members[0], tokenizer, job.out)
    return ensemble.joined(members)


def check_up(job: Job, model: Ensemble, tokenizer: Any, train: list[Pair], test: TokenisedPairs) -> dict[str, Any]:
    """Every figure of the check-up, on H held-out pairs."""
    config, pad = job.config.reward, tokenizer.pad_token_id
    bar = job.progress(len(model.members) * sequences_checked(config, test), "replies", part="check-up")

    def score(rows: list[list[int]], batch_size: int = 128) -> np.ndarray:
        return model.scores(rows, pad, batch_size, bar).double().cpu().numpy()

    chosen_rows, rejected_rows = (
        list(rows) for rows in zip(*(preferences.sequences(row) for row in test.rows), strict=True)
    )
    by_member = [model.member_scores(rows, pad, bar=bar) for rows in (chosen_rows, rejected_rows)]  # [members, H]
    chosen, rejected = (model.combined(scores).double().cpu().numpy() for scores in by_member)
    raw = torch.tensor([[member.config.score_std] for member in model.members])  # [members, 1]
    difference = ((by_member[0] - by_member[1]) * raw).mean(0).double().cpu().numpy()  # on the scale of the loss
    positions = loading.context_length(model.members[0].config)
    checked = (
        checkup.accuracy(chosen, rejected, train, test.pairs)
        | checkup.breakdown(chosen, rejected, test.pairs)
        | checkup.calibration(difference, test.pairs)
        | checkup.correlations(chosen, rejected, test.pairs)
        | {"probes": checkup.probes(score, tokenizer, test.pairs, positions, config.probe_prompts)}
        | {"batch_difference": checkup.batch_difference(score, chosen_rows)}
    )
    bar.close()
    return checked

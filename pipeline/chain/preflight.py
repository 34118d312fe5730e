"""The preflight: before the first stage of a command runs, its models and rows show that every stage can use them.

The checkpoint, or a new model of the same shape, answers one short conversation, and what samples from it is held to a
plain forward pass; the judge model gives two verdicts; the first rows of every source are rendered by the template.
"""

import copy
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from threefold.columns import Message
from threefold.data import reading
from threefold.errors import UserError, first_line
from threefold.evaluation import judge_model
from threefold.execution.device import Device
from threefold.execution.job import quiet_libraries
from threefold.models import chat, loading
from threefold.sampling import decoding, sampler
from threefold.stages import STAGES, sources
from threefold.stages import tokenizer as tokenizer_stage
from threefold.training import fused

CONVERSATION: list[Message] = [{"role": "user", "content": "Hi"}]
REPLIES = ("chosen", "rejected", "reply")  # what a row of preferences may hold
FIRST = 200  # rows of a source that are rendered
LARGE = 2 * 2**30  # bytes of a judge's weights from which only its tokenizer and its verdicts are looked at


def check(config: DictConfig, planned: dict[str, Any]) -> None:
    """Try what the stages to be made start from; raises `UserError`. Nothing is tried twice in one process."""
    unmade = [name for name, entry in planned.items() if not entry.artifact.finished]
    ppo = config.ppo
    own_critic = ppo.advantage == "gae" and ppo.critic == "separate" and ppo.lora_rank is None
    scored = "reward" in unmade or ("ppo" in unmade and own_critic)
    quiet_libraries()
    with torch.random.fork_rng(devices=[]):
        if "pretrain" in unmade:
            settings = OmegaConf.to_container(OmegaConf.merge(config.sampling, {"max_new_tokens": 2, "batch_size": 1}))
            model = json.dumps(OmegaConf.to_container(config.model))
            _check_model(
                model, config.tokenizer.template_date, json.dumps(settings), scored, bool(config.pretrain.tokens)
            )
        elif "pretrain" in planned:
            static = config.sampling.static_cache and any("sampling" in STAGES[name].keys for name in unmade)
            check_made(planned["pretrain"].artifact.folder, static, scored)
        if "evaluate" in unmade and config.evaluate.judge_model.path:
            judge = json.dumps(OmegaConf.to_container(config.evaluate.judge_model))
            _check_judge(judge, config.tokenizer.template_date)
    rendered = sorted({key for name in unmade for key in sources(name, config)} & {"data.replies", "data.preferences"})
    if rendered and config.model.checkpoint:  # our own template renders everything
        check_rows(config, _tokenizer(config, planned), rendered)


@functools.cache
def _check_model(model_json: str, template_date: str, sampling_json: str, scored: bool, trained: bool) -> None:
    config, settings = OmegaConf.create(json.loads(model_json)), OmegaConf.create(json.loads(sampling_json))
    name = f"model.checkpoint={config.checkpoint}" if config.checkpoint else f"model.model_type={config.model_type}"
    if config.checkpoint:
        tell(f"{name}: loading it for one reply, one forward pass and one decoding step")
    try:
        tokenizer, model = start(config, template_date)
        if trained:
            fused.layouts(model)
        check_model(model, tokenizer, settings, scored)
    except UserError as error:
        raise error if str(error).startswith(("model.", "pretrain.")) else UserError(f"{name}: {error}") from error
    except (OSError, ValueError, jinja2.TemplateError) as error:
        raise UserError(f"{name}: cannot be used ({first_line(error)})") from error
    if decoding.kind_for(model) is decoding.RecomputingDecoder:
        tell(f"{name}: its cache is of no kind that can be used here; every token takes a whole forward pass: slow")


def start(config: DictConfig, template_date: str) -> tuple[Any, nn.Module]:
    """Tokenizer and model that the chain starts from: the checkpoint's, or for a new model some of the same shape."""
    if config.checkpoint:
        tokenizer = tokenizer_stage.from_checkpoint(config, template_date)
        return tokenizer, loading.from_checkpoint(config, tokenizer).eval()
    tokenizer = tokenizer_stage.train([], 300)
    model = loading.from_scratch(config, tokenizer, 0).eval()
    for parameter in model.parameters():
        if not parameter.any():  # blocks that start as the identity would hide what a decoder does
            nn.init.normal_(parameter, std=0.02)
    return tokenizer, model


def check_model(model: nn.Module, tokenizer: Any, settings: Any, scored: bool) -> None:
    """Hold a causal language model to what stages do with it; `scored`: a reward model or critic is made of it."""
    ids = chat.prompt_ids(tokenizer, CONVERSATION)
    if not 0 < len(ids) <= loading.context_length(model.config) - settings.max_new_tokens:
        raise UserError(
            f"a short conversation is {len(ids)} tokens, and the model reads {loading.context_length(model.config)}"
        )
    loading.require_own_logits(model)
    numbers = sampler.random_numbers(0, 1, settings)
    sampler.sample(model, [ids], settings, tokenizer, numbers)  # decoder and forward pass are compared in here
    if scored:
        require_score(model.config)


def check_made(folder: Path, static: bool, scored: bool) -> None:
    """Hold a base model that is made to what was asked for since, by its shape alone.

    static: a stage samples with a static cache.
    """
    if not static and not scored:
        return
    model = loading.load_policy(folder, "meta")
    if static:
        sampler.require_static(model)
    if scored:
        require_score(model.config)


def require_score(config: Any) -> None:
    """Raises `UserError` where no reward model can be made of the architecture."""
    config = copy.deepcopy(config)
    config.num_labels = 1
    try:
        with torch.device("meta"):
            scorer = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except ValueError:
        scorer = None
    if not hasattr(scorer, "score"):
        raise UserError(
            f"transformers has no reward model of the architecture {config.model_type} with one score layer; choose "
            "another model, or leave out the stages reward and ppo (target=sft or target=dpo)"
        )


@functools.cache
def _check_judge(judge_json: str, template_date: str) -> None:
    """Have the judge model give verdicts on two pairs; of a large one, or one on the hub, ask its tokenizer alone."""
    config = OmegaConf.create(json.loads(judge_json))
    judge_model.check(config, template_date)
    if not 0 < judge_model.weight_bytes(config.path) < LARGE:
        return
    judge = judge_model.load(config, Device("cpu", bf16=False, threads=1), template_date)
    questions = [judge.ids(CONVERSATION, *replies) for replies in (("Fine.", "No."), ("No.", "Fine."))]
    judge.probabilities(questions)  # which refuses what is no number


def _tokenizer(config: DictConfig, planned: dict[str, Any]) -> Any:
    made = planned["tokenizer"].artifact if "tokenizer" in planned else None
    if made is not None and made.finished:
        return chat.load_tokenizer(made.folder)
    return tokenizer_stage.from_checkpoint(config.model, config.tokenizer.template_date)


def check_rows(config: DictConfig, tokenizer: Any, keys: Iterable[str]) -> None:
    """Render the first rows of sources.

    Raises `UserError` with file and line where the template refuses more of them than the source allows of all its
    rows, or every one of them.
    """
    for key in keys:
        source = OmegaConf.select(config, key)
        if source.path is None:
            continue
        if key == "data.replies":
            examples = reading.examples(source, "train", config.data.dialogue)
            dialogues: list[Any] = [(example.prompt, example.reply) for example in examples]
        else:
            rows = [row for row in reading.load(source, "train").rows if "prompt" in row]
            dialogues = [(row["prompt"], *(row[name] for name in REPLIES if name in row)) for row in rows]
        first, share = dialogues[:FIRST], source.max_unusable_share
        reasons = [chat.refusal(tokenizer, *dialogue) for dialogue in first]
        refused = [(prompt, reason) for (prompt, *_), reason in zip(first, reasons, strict=True) if reason is not None]
        all_of_many = len(refused) == len(first) and share < 1
        if refused and (all_of_many or len(refused) > min(share * len(dialogues), len(dialogues) - 1)):
            prompt, reason = refused[0]
            place = reading.place_of(source, prompt, config.data.dialogue)
            raise UserError(
                f"{key}: the chat template of model.checkpoint={config.model.checkpoint} refuses {len(refused)} of the "
                f"first {len(first)} of {len(dialogues):,} dialogues, {place} for one: {reason}; give "
                f"dialogues that it renders, or a checkpoint that takes them, or set {key}.max_unusable_share higher"
            )


def tell(text: str) -> None:
    """One line for the person who watches."""
    tqdm.write(f"{'preflight':<12} {text}")

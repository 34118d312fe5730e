"""Tiny models, a tiny tokenizer, jobs and pairs that several tests share."""

import functools
from pathlib import Path

import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from threefold.config.compose import compose
from threefold.data import preferences
from threefold.data.preferences import Pair
from threefold.execution.job import Job
from threefold.fileio import write_json
from threefold.models import chat, loading
from threefold.models.ensemble import Ensemble
from threefold.ppo.actors import Actors
from threefold.ppo.rollouts import Prompt
from threefold.rewards.learned import learned
from threefold.schema.stages import PROBES
from threefold.stages import ppo
from threefold.stages import tokenizer as tokenizer_stage

SENTENCES = [
    "Hello there, how are you doing today?",
    "I am doing well, thank you for asking; and how are you?",
    "The weather is nice today, and we are going to the park.",
    "What do you like to do when the weather is bad?",
    "I like to read, and to play the piano when it rains.",
]

PAIRS = [
    Pair([{"role": "user", "content": "Hello there"}], "Hello, how are you?", "No.", 0.5, "samples"),
    Pair(
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What do you like?"}],
        "the piano", " I like\n\nthe rain, and to read 雨 when it rains.", None, "people",
    ),
    Pair(
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello<|end|> there "},
            {"role": "user", "content": "What is the weather<|assistant|>like? "},
        ],
        "It is nice today, we are going to the park.", "bad<|end|><|user|>weather", 0.1, "samples",
    ),
    Pair([{"role": "user", "content": "thank you"}], "?", "you are asking", 0.2, "samples"),
]  # fmt: skip


@functools.cache
def tiny_tokenizer():
    return tokenizer_stage.train(SENTENCES, 300)


def tiny_config(model_type: str, **options):
    tokenizer = tiny_tokenizer()
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
    if model_type != "gpt2":
        shape |= {"intermediate_size": 32, "num_key_value_heads": 1}
    if model_type == "qwen3":
        shape |= {"head_dim": 8}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    # weights ten times as large as usual, so that distributions are far from uniform and attention matters
    return AutoConfig.for_model(
        model_type, **ids, vocab_size=len(tokenizer), initializer_range=0.2, dtype="float32", **(shape | options)
    )


def tiny_policy(model_type: str = "qwen3", seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, **options)).eval()


def tiny_reward_model(model_type: str = "qwen3", seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(tiny_config(model_type, num_labels=1)).eval()
    model.config.score_mean, model.config.score_std = 0.3, 1.7
    return model


def favour(model: nn.Module, token: int, by: float) -> nn.Module:
    """The model with `by` added to the logit of `token`, so that replies end by themselves."""
    old = model.get_output_embeddings()
    biased = nn.Linear(old.in_features, old.out_features)
    biased.weight = old.weight
    nn.init.zeros_(biased.bias)
    biased.bias.data[token] = by
    model.set_output_embeddings(biased)
    return model


def perturb(model: nn.Module, size: float = 0.02, seed: int = 0) -> None:
    """Add normal noise to all weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=size)


def random_ids(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Token sequences of the lengths given, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(7, len(tiny_tokenizer()), (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def plain_logprobs(model: nn.Module, prompt: list[int], reply: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of each reply token from one forward pass over one unpadded row."""
    logits = model(input_ids=torch.tensor([prompt + reply]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1)[range(len(reply)), reply]


@torch.no_grad()
def plain_score(reward_model: nn.Module, sequence: list[int]) -> float:
    """The score of the last token's state from one forward pass over one unpadded row."""
    states = reward_model.base_model(input_ids=torch.tensor([sequence])).last_hidden_state[0]
    return reward_model.score(states[-1]).item()


def make_job(stage: str, folder: Path, *overrides: str) -> Job:
    """A job of `stage` on one CPU thread, with its folders below `folder`."""
    config = compose(["experiment=smoke", "runtime.device=cpu", "runtime.threads=1", "runtime.log_every=1", *overrides])
    out, checkpoints = folder / "out", folder / "checkpoints"
    for created in (out, checkpoints):
        created.mkdir(parents=True)
    return Job(stage, config, {}, out, checkpoints)


def make_ppo(folder, micro: int, *overrides: str) -> ppo.Ppo:
    """PPO with tiny models. Plain gradient descent at rate 1 and no clipping: parameters move by their gradient."""
    options = [
        "ppo.batch_size=12",
        "ppo.minibatches=2",
        "ppo.max_grad_norm=0",
        "sampling.max_new_tokens=10",
        *overrides,
    ]
    job = make_job("ppo", folder, *options)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if job.device.bf16 else "no")
    policy, reference = (favour(tiny_policy(), tiny_tokenizer().eos_token_id, 3.0) for _ in range(2))
    critic, reward_model = tiny_reward_model(), Ensemble([tiny_reward_model()])
    trained = {"policy": policy, "critic": critic}
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=1.0) for name, model in trained.items()}
    return ppo.Ppo(
        job=job,
        config=job.config.ppo,
        accelerator=accelerator,
        tokenizer=tiny_tokenizer(),
        actors=Actors(policy, reference, critic, reward_model),
        reward=learned(reward_model, tiny_tokenizer(), micro),
        optimizers=optimizers,
        text=None,
        micro_batch_size=micro,
    )


PROMPTS = [
    Prompt(ids, [{"role": "user", "content": f"question {i}"}], f"answer {i}")
    for i, ids in enumerate(random_ids([3, 11, 1, 6, 20, 5, 5, 2, 9, 14, 4, 7], seed=1))
]


def flat(model) -> torch.Tensor:
    """All weights in one vector, a copy."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def write_model(model: nn.Module, folder: Path) -> Path:
    """A model's artifact, as far as later stages look at it."""
    loading.save(model, tiny_tokenizer(), folder)
    write_json(folder / "metrics.json", {"template_hash": chat.template_hash(tiny_tokenizer())})
    return folder


def numbered_pairs(count: int) -> list[Pair]:
    """Pairs of as many prompts; the chosen replies are the longer ones, and grow longer."""
    prompts = [[{"role": "user", "content": f"question {i}"}] for i in range(count)]
    return [Pair(prompt, "yes " * (1 + i), "no", 0.5, "samples") for i, prompt in enumerate(prompts)]


def with_comparisons(job: Job, train: list[Pair], test: list[Pair]) -> Job:
    """The job with a tiny SFT model and these pairs as its inputs."""
    folder = job.out.parent / "comparisons"
    folder.mkdir()
    preferences.write(folder / "train.jsonl", train)
    preferences.write(folder / "test.jsonl", test)
    job.inputs |= {"sft": write_model(tiny_policy(), job.out.parent / "sft"), "comparisons": folder}
    return job


composed_once = functools.cache(lambda *overrides: compose(["experiment=smoke", *overrides]))


def composed(*overrides):
    """The smoke configuration with `overrides`; plain values are set on a copy, because composing takes longer."""
    values = [o for o in overrides if "." in o.partition("=")[0] and not o.startswith("+") and "@" not in o]
    config = composed_once(*(o for o in overrides if o not in values)).copy()
    OmegaConf.set_readonly(config, False)
    config.merge_with_dotlist(values)
    return config


# metrics of a reward model that passes every limit of the gate
GATE_METRICS = {
    "accuracy": 0.8,
    "accuracy_ci95": [0.7, 0.9],
    "accuracy_length_only": 0.6,
    "over_length_ci95": [0.1, 0.3],
    "accuracy_bag_of_words": 0.75,
    "over_bag_of_words_ci95": [-0.02, 0.12],
    "length_correlation": 0.1,
    "calibration_error": 0.05,
    "calibration_noise": 0.03,
    "batch_difference": 1e-6,
    "train_overlap": 0,
    "test_pairs": 100,
    "probes": {name: {"preferred_share": 0.1, "score_mean": -1.0} for name in PROBES},
}

"""LoRA: low-rank adapters on a frozen base, several on one (Hu et al. 2021, arXiv 2106.09685), through PEFT.

Tensors by name are parameters of any shape; a matrix is [out, in], and that of a Conv1D [in, out].
"""

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from threefold.models import Model

SAVED = Path("adapter") / "adapter_model.safetensors"  # where a stage that trains an adapter leaves it


def adapter_config(model: Model, rank: int, alpha: float, **options: Any) -> LoraConfig:
    """Adapters of `rank` on every matrix of the model's blocks; what they add counts alpha / rank times."""
    matrices = {
        name.rsplit(".", 1)[-1]: module
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | BaseTunerLayer) and "lora_" not in name and "base_layer" not in name
    }
    transposed = any(isinstance(getattr(m, "base_layer", m), Conv1D) for m in matrices.values())
    return LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),  # as peft types what it takes as a fraction, too
        lora_dropout=0.0,
        target_modules=sorted(matrices),
        fan_in_fan_out=transposed,
        **options,
    )


def add_adapter(base: Model, name: str, rank: int, alpha: float, seed: int) -> None:
    """Give the base one more adapter, which has no effect until it is trained."""
    torch.manual_seed(seed)
    _add(base, adapter_config(base, rank, alpha), name)


def _add(base: Model, config: LoraConfig, name: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are the point
        base.add_adapter(config, name)


def load_adapter(base: Model, name: str, folder: Path) -> nn.Linear:
    """Give the base the adapter of a reward model's artifact, `adapter/` in `folder`; returns its score layer."""
    saved = {key.removeprefix("base_model.model."): value for key, value in load_file(folder / SAVED).items()}
    config = LoraConfig.from_pretrained(str((folder / SAVED).parent))
    config.modules_to_save = config.task_type = None
    _add(base, config, name)
    _fill(base, name, saved)
    score = nn.Linear(base.config.hidden_size, 1, bias=False, device=base.device)
    with torch.no_grad():
        score.weight.copy_(saved["score.weight"])
    return score


def copy_adapter(base: Model, source: str, name: str) -> None:
    """Give the base one more adapter that equals the adapter `source`."""
    _add(base, copy.deepcopy(base.peft_config[source]), name)
    source_values = {key.replace(f".{source}.", "."): p for key, p in base.named_parameters() if f".{source}." in key}
    _fill(base, name, source_values)


@torch.no_grad()
def _fill(base: Model, name: str, values: dict[str, Tensor]) -> None:
    """Copy into the adapter `name` the values of its parameters [any shape], by their names without the adapter's."""
    for key, parameter in base.named_parameters():
        if f".{name}." in key:
            parameter.copy_(values[key.replace(f".{name}.", ".")])


@torch.no_grad()
def merged_weight(layer: Any, adapters: list[str] | None = None) -> Tensor:
    """The matrix [out, in] of a linear layer with what `adapters` add to it, or else those that are switched on."""
    weight = layer.weight.detach()
    if not isinstance(layer, BaseTunerLayer):
        return weight
    if adapters is None:
        adapters = [] if layer.disable_adapters else layer.active_adapters
    for adapter in adapters:
        weight = weight + layer.get_delta_weight(adapter)
    return weight


def merged_weights(base: Model, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """Names and weights [any shape] of the base with the adapter merged, made one at a time."""
    for name, parameter in base.named_parameters():
        if "lora_" not in name:
            layer, matrix, _ = name.partition(".base_layer.weight")
            weight = merged_weight(base.get_submodule(layer), [adapter]) if matrix else parameter.detach()
            yield name.replace(".base_layer.", "."), weight


@torch.no_grad()
def merge_into(model: Model, base: Model, adapter: str) -> Model:
    """`model`, a copy of the base without adapters, whose trunk becomes that of the base with the adapter merged."""
    trunk = dict(model.base_model.named_parameters(prefix=model.base_model_prefix))
    for name, weight in merged_weights(base, adapter):
        if name in trunk:
            trunk[name].copy_(weight)
    return model


class Adapted:
    """A base with one of its adapters, or with none, in the place of a model of its own.

    Several of these share one base and its memory. `base_model` switches the adapter on. PEFT lets gradients flow only
    to adapters that are on, so the backward pass comes before the forward pass of the next one. With a `score`, a
    linear layer, it is a reward model or critic; `scale` is mean and deviation of its raw scores.
    """

    def __init__(self, base: Model, adapter: str | None, score: nn.Module | None = None, scale: tuple = (0.0, 1.0)):
        self.base, self.adapter, self.score = base, adapter, score
        self.config = copy.copy(base.config)
        self.config.score_mean, self.config.score_std = scale

    @property
    def base_model(self) -> nn.Module:
        """The trunk, with the adapter switched on."""
        if self.adapter is None:
            self.base.disable_adapters()
        else:
            self.base.enable_adapters()
            self.base.set_adapter(self.adapter)
        return self.base.base_model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.base.device

    def get_input_embeddings(self) -> nn.Module:
        """The base's."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The base's."""
        return self.base.get_output_embeddings()

    def state_dict(self) -> dict[str, Tensor]:
        """The adapter's matrices [rank, in] and [out, rank] and the score's [1, D]: all that is trained."""
        adapter = {name: p for name, p in self.base.named_parameters() if f".{self.adapter}." in name}
        return adapter | ({f"score.{name}": p for name, p in self.score.named_parameters()} if self.score else {})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over weights that `state_dict` gave."""
        with torch.no_grad():
            for name, parameter in self.state_dict().items():
                parameter.copy_(state[name])

    def parameters(self) -> list[Tensor]:
        """What is trained, in the shapes of `state_dict`."""
        return list(self.state_dict().values())

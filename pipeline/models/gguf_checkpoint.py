"""Checkpoints in GGUF, llama.cpp's format: one file, unpacked into an ordinary model in fp32."""

import importlib.util
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM

from threefold.errors import UserError
from threefold.models import Model, checkpoints


def check(model: Any) -> None:
    """Raise `UserError` where the file is not in its folder, or cannot be read here."""
    folder, file = Path(model.checkpoint), Path(model.gguf_file)
    checkpoints.check_place(model.checkpoint, f"model.checkpoint={model.checkpoint}")
    if file.is_absolute() or ".." in file.parts:
        raise UserError(f"{name_of(model)}: must be the name of a file in model.checkpoint={model.checkpoint}")
    if folder.is_dir() and not (folder / file).is_file():
        names = sorted(str(f.relative_to(folder)) for f in folder.rglob("*.gguf"))
        raise UserError(f"{name_of(model)}: {folder} has no such file; it has {', '.join(names) or 'no GGUF file'}")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{name_of(model)}: needs the package gguf; install it with `pip install 'threefold[gguf]'`")


def name_of(model: Any) -> str:
    """How messages about the file begin."""
    return f"model.gguf_file={model.gguf_file}"


def place(model: Any) -> str:
    """The file as transformers gets it: by its path, as one of that name in the working directory would come first."""
    return (
        str((Path(model.checkpoint) / model.gguf_file).absolute())
        if Path(model.checkpoint).is_dir()
        else model.gguf_file
    )


def load(model: Any) -> Model:
    """The causal language model in the file, unpacked into fp32."""
    from transformers import GgufConfig

    check(model)
    name = name_of(model)
    with checkpoints.loading(name):
        loaded, info = cast(Any, AutoModelForCausalLM).from_pretrained(
            model.checkpoint,
            gguf_file=place(model),
            revision=model.revision or "main",
            quantization_config=GgufConfig(dequantize=True),  # without it the model cannot be saved
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
        )
        left_out = tensors_left_out(model, loaded)
    checkpoints.require_whole(loaded, info | {"unexpected_keys": left_out | set(info["unexpected_keys"])}, name)
    checkpoints.require_causal(loaded, name)
    return loaded


def tensors_left_out(model: Any, loaded: Model) -> set[str]:
    """Tensors of the file that transformers has no place for and skips silently.

    Examples are biases and rope_freqs.weight, the frequencies of Llama 3's long context. Tensors of experts do not
    count: transformers joins them under other names.
    """
    from transformers.integrations.gguf import read_gguf_metadata
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
    from transformers.utils import cached_file

    file = cached_file(model.checkpoint, place(model), revision=model.revision or "main")
    metadata, names = read_gguf_metadata(cast(str, file))  # it raises where there is none
    architecture = metadata["general.architecture"]
    if is_gguf_arch_supported(architecture):
        return set()  # these are in the loading info
    processor: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=loaded.config.to_dict())
    return {name for name in names if "_exps." not in name} - get_gguf_hf_weights_map(loaded, processor).keys()

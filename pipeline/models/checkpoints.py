"""Model folders and models of the hub: loaded whole, or refused in one line.

Every tensor of a checkpoint is loaded and none is made up. Code that comes with a checkpoint does not run unless that
was asked for. A refusal begins with `name`: the key and its value, or a folder.

Checkpoints in GGUF, llama.cpp's format: one file, unpacked into an ordinary model in fp32.
"""

import contextlib
import importlib.util
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from threefold.errors import UserError
from threefold.models import Model
from threefold.models.__init__ import ADAPTER, adapter_base, adapter_revision

SCORED = ("ForSequenceClassification", "ForTokenClassification", "RewardModel")
NOT_CAUSAL = ("ForMaskedLM", "ForPreTraining", "ForQuestionAnswering", "ForMultipleChoice")
SHOWN = 3  # names of tensors in a message


@contextlib.contextmanager
def loading(name: str) -> Generator[None, None, None]:
    """Turn whatever transformers or peft raises over a checkpoint into one line, without warnings and tables before it.

    These errors have many types (one of its own for a field of config.json that is no number), and all are about the
    checkpoint.
    """
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        code = "trust_remote_code" in reason
        raise UserError(f"{name}: {NEEDS_CODE if code else f'cannot be loaded ({reason[:200]})'}") from error
    finally:
        transformers.logging.set_verbosity(level)


NEEDS_CODE = "needs code of its own (auto_map), which is not run; use a model whose architecture transformers has"


def check(path: str, name: str, revision: str | None = None, trust_remote_code: bool = False) -> bool:
    """Whether a causal language model needs code of its own, which `trust_remote_code` then allows.

    Raises `UserError` where `path` holds no model that can be loaded whole. Reads configurations and headers of files,
    neither weights nor code.
    """
    check_place(path, name)
    if base := adapter_base(Path(path)):
        return check_adapter(Path(path), base, name, trust_remote_code)
    with loading(name):
        config, _ = PreTrainedConfig.get_config_dict(path, revision=revision or "main")
        problem = problem_of_files(Path(path)) or problem_of(config, trust_remote_code)
    if problem:
        raise UserError(f"{name}: {problem}")
    return needs_code(config)


def check_place(path: str, name: str) -> None:
    """Raise `UserError` where `path` is a file, or is written like a folder that is not there."""
    place = Path(path)
    if place.suffix == ".gguf" and place.is_file():
        raise UserError(f"{name}: is a file; set model.checkpoint={place.parent} and model.gguf_file={place.name}")
    if place.is_file():
        raise UserError(f"{name}: is a file; name the folder that it is in")
    if not place.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise UserError(f"{name}: no such folder; name one that transformers saved, or a model of the hub")


def check_adapter(folder: Path, base: str, name: str, trust_remote_code: bool) -> bool:
    """Whether an adapter's base needs code of its own; raises `UserError` where the two cannot be merged."""
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        raise UserError(f"{name}: holds both a model and an adapter ({ADAPTER}); give each a folder of its own")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{name}: is an adapter without adapter_model.safetensors; save it again with peft")
    if Path(base).is_dir() and adapter_base(Path(base)):
        raise UserError(f"{name}: is an adapter on another one, {base}; merge that one first")
    return check(base, f"{name}: its base model {base}", adapter_revision(folder), trust_remote_code)


def needs_code(config: dict[str, Any]) -> bool:
    """Whether a model can only be made by code that comes with its checkpoint.

    Where transformers has the architecture it uses its own code, although many checkpoints bring some as well.
    """
    code, kind = config.get("auto_map") or {}, config.get("model_type")
    return ("AutoConfig" in code and kind not in CONFIG_MAPPING) or (
        "AutoModelForCausalLM" in code and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )


def problem_of(config: dict[str, Any], trust_remote_code: bool = False) -> str | None:
    """Why a configuration is not that of a causal language model that can be trained; None where it is."""
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    if needs_code(config):
        return None if trust_remote_code else NEEDS_CODE
    if not kind:
        return "has no config.json with a model_type; name a folder that transformers saved"
    if kind not in CONFIG_MAPPING:
        return f"its architecture, {kind}, is unknown to transformers {transformers.__version__}"
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "quantised")
        return f"its weights are quantised ({method}) and cannot be trained; take the checkpoint that it was made from"
    if any(name.endswith(SCORED) for name in architectures):
        return f"is a reward model or another classifier ({architectures[0]}), not a causal language model"
    encodes = config.get("is_encoder_decoder", getattr(CONFIG_MAPPING[kind], "is_encoder_decoder", False))
    masked = any(name.endswith(NOT_CAUSAL) for name in architectures)
    if encodes or masked or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"is no causal language model ({', '.join(architectures) or kind})"
    if "text_config" in config or "text_config" in CONFIG_MAPPING[kind].sub_configs:
        return f"is a model of text and images ({', '.join(architectures) or kind}); save its language model by itself"
    return None


def problem_of_files(folder: Path) -> str | None:
    """Why the weights in a local folder cannot be loaded, as far as names and headers tell; None where they can."""
    if not folder.is_dir():
        return None
    if not any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        pickled = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickled:
            return f"its weights are pickled ({pickled[0]}), and a pickle can run code; convert them to safetensors"
        gguf = sorted(f.name for f in folder.glob("*.gguf"))
        return (
            f"has GGUF files only; set model.gguf_file={gguf[0]}" if gguf else f"has no weights ({SAFE_WEIGHTS_NAME})"
        )
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except Exception as error:  # of a type that safetensors does not export
            return f"{file.name} is damaged ({error}); copy it again"
    return None


def load(kind: Any, path: str | Path, name: str, new_head: bool = False, **options: Any) -> Model:
    """The model of class `kind`, with every tensor of the checkpoint and no other.

    new_head: a score takes the place of the output layer and is new.
    """
    if (Path(path) / ADAPTER).is_file():
        raise UserError(f"{name}: is an adapter ({ADAPTER}); merge it into its base model and save that")
    if problem := problem_of_files(Path(path)):
        raise UserError(f"{name}: {problem}")
    options = {"use_safetensors": True, "trust_remote_code": False} | options
    with loading(name):
        model, info = kind.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"{name}: is an adapter; download it to a folder and name that")
    require_whole(model, info, name, new_head)
    return model


def require_whole(model: Model, info: dict[str, Any], name: str, new_head: bool = False) -> None:
    """Raise `UserError` where transformers made up a tensor, or left one of the checkpoint out."""
    missing, left_out = set(info["missing_keys"]), set(info["unexpected_keys"])
    if new_head:
        missing -= {"score.weight"}
        left_out = {key for key in left_out if key.startswith(f"{model.base_model_prefix}.")}
    architecture = type(model).__name__
    if any(key.startswith(("score.", "classifier.")) for key in left_out):
        raise UserError(f"{name}: is a reward model or another classifier, not a causal language model")
    if info["mismatched_keys"]:
        key, stored, needed = min(info["mismatched_keys"])
        raise UserError(f"{name}: {key} has the shape {tuple(stored)}, and config.json asks for {tuple(needed)}")
    if missing:
        raise UserError(f"{name}: {listed(missing)} of {architecture} is not in the checkpoint; copy it again, whole")
    if left_out:
        raise UserError(f"{name}: {listed(left_out)} has no place in {architecture}; save the model without it")


def listed(keys: set[str]) -> str:
    """The first names of tensors, and how many there are."""
    more = len(keys) - SHOWN
    return ", ".join(sorted(keys)[:SHOWN]) + (f" and {more} more" if more > 0 else "")


@torch.no_grad()
def require_causal(model: Model, name: str) -> None:
    """Raise `UserError` where the logits [B, T, V] of a token depend on the tokens after it, as in an encoder."""
    with loading(name):
        logits = model(input_ids=torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])).logits[:, :-1].float()
    if (logits[0] - logits[1]).abs().max() > 1e-4 * logits.abs().max():
        raise UserError(f"{name}: is no causal language model ({type(model).__name__}): its tokens see later ones")


def load_causal(path: str, name: str, **options: Any) -> Model:
    """The causal language model of a checkpoint, fp32; an adapter is merged into its base."""
    base = adapter_base(Path(path))
    check(path, name, options.get("revision"), options.get("trust_remote_code", False))
    if base:
        options["revision"] = adapter_revision(Path(path))
    model = load(AutoModelForCausalLM, base or path, name, dtype=torch.float32, **options)
    if base:
        model = merged(model, Path(path), name)
    require_causal(model, name)
    return model


def merged(model: Model, folder: Path, name: str) -> Model:
    """The model with the adapter in `folder` merged into it, and with rows for the tokens that came with that."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    with loading(name):
        saved = load_file(folder / "adapter_model.safetensors")
        embedding = next(key for key, module in model.named_modules() if module is model.get_input_embeddings())
        rows = saved.get(f"base_model.model.{embedding}.weight")
        if rows is not None and len(rows) != model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(rows), mean_resizing=False)  # the adapter's own rows replace all
        adapted = PeftModel.from_pretrained(model, str(folder), torch_device="cpu")
        trained = get_peft_model_state_dict(adapted).keys()
        differing = (trained - saved.keys()) | (saved.keys() - trained - adapted.state_dict().keys())
        if differing:
            raise UserError(f"{name}: {listed(differing)} of the adapter does not fit its base model")
        return adapted.merge_and_unload()


def check_gguf(model: Any) -> None:
    """Raise `UserError` where the file is not in its folder, or cannot be read here."""
    folder, file = Path(model.checkpoint), Path(model.gguf_file)
    check_place(model.checkpoint, f"model.checkpoint={model.checkpoint}")
    if file.is_absolute() or ".." in file.parts:
        raise UserError(f"{gguf_name(model)}: must be the name of a file in model.checkpoint={model.checkpoint}")
    if folder.is_dir() and not (folder / file).is_file():
        names = sorted(str(f.relative_to(folder)) for f in folder.rglob("*.gguf"))
        raise UserError(f"{gguf_name(model)}: {folder} has no such file; it has {', '.join(names) or 'no GGUF file'}")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{gguf_name(model)}: needs the package gguf; install it with `pip install 'threefold[gguf]'`")


def gguf_name(model: Any) -> str:
    """How messages about the file begin."""
    return f"model.gguf_file={model.gguf_file}"


def gguf_place(model: Any) -> str:
    """The file as transformers gets it: by its path, as one of that name in the working directory would come first."""
    return (
        str((Path(model.checkpoint) / model.gguf_file).absolute())
        if Path(model.checkpoint).is_dir()
        else model.gguf_file
    )


def load_gguf(model: Any) -> Model:
    """The causal language model in the file, unpacked into fp32."""
    from transformers import GgufConfig

    check_gguf(model)
    name = gguf_name(model)
    with loading(name):
        loaded, info = cast(Any, AutoModelForCausalLM).from_pretrained(
            model.checkpoint,
            gguf_file=gguf_place(model),
            revision=model.revision or "main",
            quantization_config=GgufConfig(dequantize=True),  # without it the model cannot be saved
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
        )
        left_out = gguf_tensors_left_out(model, loaded)
    require_whole(loaded, info | {"unexpected_keys": left_out | set(info["unexpected_keys"])}, name)
    require_causal(loaded, name)
    return loaded


def gguf_tensors_left_out(model: Any, loaded: Model) -> set[str]:
    """Tensors of the file that transformers has no place for and skips silently.

    Examples are biases and rope_freqs.weight, the frequencies of Llama 3's long context. Tensors of experts do not
    count: transformers joins them under other names.
    """
    from transformers.integrations.gguf import read_gguf_metadata
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
    from transformers.utils import cached_file

    file = cached_file(model.checkpoint, gguf_place(model), revision=model.revision or "main")
    metadata, names = read_gguf_metadata(cast(str, file))  # it raises where there is none
    architecture = metadata["general.architecture"]
    if is_gguf_arch_supported(architecture):
        return set()  # these are in the loading info
    processor: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=loaded.config.to_dict())
    return {name for name in names if "_exps." not in name} - get_gguf_hf_weights_map(loaded, processor).keys()

"""Models: made, loaded, adapted and saved, and what they say of tokens."""

from typing import Any

# A model of transformers, or `lora.Adapted` in its place. torch types each attribute of a module as Tensor | Module, so
# that config, base_model and score would be either; `Any` lets them be what they are.
Model = Any

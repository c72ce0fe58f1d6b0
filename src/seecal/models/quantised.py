"""Models whose linear layers are kept in 4 bits (bitsandbytes), for adapters to be trained on: QLoRA."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..families.table import decoder_of

_BLOCK = 64  # weights that share a scale, as transformers has bitsandbytes make them
_REMEDY = "Set {load_in_4bit: true}, or take quantization_config out."


def four_bit_config(source: str, given: Any, bf16: bool) -> dict[str, Any]:
    """``quantization_config`` for a stage with adapters: the language model in 4 bits, all else as it is.

    What is not given: nf4 (the QLoRA paper's type), products in bfloat16 if ``bf16`` else float32, and
    ``llm_int8_skip_modules`` names what lies beside the text decoder: vision tower, projector, lm_head. CAL reads the
    head's weight, and a module in 4 bits cannot be trained whole. Layers of the decoder whose rows are no whole number of
    blocks stay, too: on the CPU bitsandbytes decodes them wrongly.

    Args:
        source: the model's folder or hub id.
        given: arguments of :class:`transformers.BitsAndBytesConfig`.
        bf16: whether the stage computes in bfloat16.

    Raises:
        ValueError: not in 4 bits, an argument that does not exist, or a model that is quantised already.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

    if not isinstance(given, Mapping) or given.get("load_in_4bit") is not True:
        raise ValueError(f"model_init_kwargs.quantization_config={given!r}: adapters are trained on 4 bits. {_REMEDY}")
    known = [name for name in inspect.signature(BitsAndBytesConfig).parameters if name != "kwargs"]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"model_init_kwargs.quantization_config.{name}: no such argument of BitsAndBytesConfig. "
                + (f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}")
            )
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{source}: quantised already, by its own config.json. Take model_init_kwargs.quantization_config out."
        )
    with torch.device("meta"):
        layout: Any = AutoModelForImageTextToText.from_config(config)
    return {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16" if bf16 else "float32",
        "llm_int8_skip_modules": [*beside_the_decoder(layout), *_odd_layers(layout)],
        **given,
    }


def beside_the_decoder(model: Any) -> list[str]:
    """Names of the modules with linear layers that are not in the text decoder, as few as there can be."""
    path = next(name for name, module in model.named_modules() if module is decoder_of(model)).split(".")
    beside = []
    for depth, own in enumerate(path):
        parent = model.get_submodule(".".join(path[:depth]))
        for name, child in parent.named_children():
            if name != own and any(isinstance(module, nn.Linear) for module in child.modules()):
                beside.append(".".join([*path[:depth], name]))
    return beside


def _odd_layers(model: Any) -> list[str]:
    decoder = set(decoder_of(model).modules())
    return [
        name
        for name, module in model.named_modules()
        if module in decoder and isinstance(module, nn.Linear) and module.in_features % _BLOCK
    ]


def four_bit_layers(model: nn.Module) -> dict[str, Any]:
    """Name → each linear layer of bitsandbytes' in 4 bits."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and hasattr(module.weight, "quant_state")
    }


def is_packed(parameter: torch.Tensor) -> bool:
    """Whether a parameter's bytes are codes, which cannot be trained. Packed ones may be stored in a float type."""
    return getattr(parameter, "quant_state", None) is not None or not parameter.is_floating_point()


def size_of(parameter: torch.Tensor) -> int:
    """How many numbers a parameter holds: one in 4 bits packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else state.shape.numel())


def dequantised(model: Any) -> Any:
    """``model`` with the values that its layers in 4 bits stand for as plain float weights, on the CPU.

    Those are what adapters were trained on: with the adapters added it computes what the model computed in training. Adding
    them to the weights from before the quantisation would be another model.
    """
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    for name, layer in four_bit_layers(model).items():
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        values = dequantize_bnb_weight(layer.weight)
        plain.weight = nn.Parameter(values.to("cpu", model.dtype), requires_grad=False)
        if layer.bias is not None:
            plain.bias = layer.bias
        model.set_submodule(name, plain)
    model.hf_quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = False  # transformers leaves it on, and then nobody may move or cast the model
    return model.to("cpu")

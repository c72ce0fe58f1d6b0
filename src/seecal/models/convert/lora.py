"""LLaVA's LoRA folder: adapters of PEFT on the language model, added to its weights a tensor at a time."""

from __future__ import annotations

import re
from pathlib import Path

from ..weight_files import Lazy, weights_in
from .configs import read_json

_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Starts that leave the model's own weights alone: others take out of them what A and B start from
_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
# What makes more of an adapter than W + s · B A of one layer
_MORE = ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication", "use_qalora")
_PAIR = re.compile(r"^(?:base_model\.model\.)?(?P<name>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")


def merged(state: dict[str, Lazy], folder: Path) -> dict[str, Lazy]:
    """The language model's tensors W with the adapters in them: W + (lora_alpha / r) · B A, computed in float32.

    Args:
        state: the language model's tensors by name.
        folder: has adapter_config.json and the adapter's tensors: A [r, in], B [out, r].

    Raises:
        ValueError: an adapter of another kind, or one for a tensor that the language model lacks.
    """
    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA" or any(map(config.get, _MORE)) or config.get("bias", "none") != "none":
        raise ValueError(f"{folder}: no plain LoRA adapter (adapter_config.json): convert the merged model instead.")
    if (start := config.get("init_lora_weights", True)) not in _STARTS:
        raise ValueError(
            f"{folder}: init_lora_weights is {start!r} (adapter_config.json): the adapter belongs to other weights than "
            "the language model's, which it changed before training. Convert the merged model, or save the adapter as a "
            "plain LoRA (path_initial_model_for_weight_conversion of PEFT's save_pretrained)."
        )
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder}: no {_FILES[0]} here; the adapter's folder is damaged. Copy it again.")
    pairs: dict[str, dict[str, Lazy]] = {}
    for name, one in weights_in(file).items():
        match = _PAIR.match(name)
        if match is None:
            raise ValueError(f"{file}: it holds {name}, which is no tensor of a LoRA adapter.")
        pairs.setdefault(f"{match['name']}.weight", {})[match["side"]] = one
    found = dict(state)
    for name, pair in pairs.items():
        if name not in state or pair.keys() != {"A", "B"}:
            raise ValueError(f"{file}: an adapter for {name}, which the language model has not, or half of one.")
        found[name] = _added(state[name], pair["A"], pair["B"], scale)
    return found


def _added(weight: Lazy, a: Lazy, b: Lazy, scale: float) -> Lazy:
    return weight.then(lambda W: (W.float() + scale * (b.read().float() @ a.read().float())).to(W.dtype))

"""What in a model's folder would run code, be unpickled or be fetched, told before anything of it is loaded.

A folder of weights comes from somewhere else: it is data. transformers and PEFT load what they find in it, also PyTorch's
own files (which hold pickles), and take from its config which kernels to fetch from a hub.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PICKLED = ("pytorch_model*.bin", "pytorch_model*.bin.index.json", "*.pth", "*.pt")
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
# Adapters of PEFT whose config names more files, models or tokenizers to load
_LEADS_ELSEWHERE = frozenset(
    ("XLORA", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
)
# Where LoRA starts from parts of the weights and takes them out of those: by chance, by gradients or by data of that run
_UNKNOWN_WEIGHTS = ("pissa_niter", "corda", "lora_ga")


def check_weights(folder: Path, options: Mapping[str, Any]) -> None:
    """ValueError where the weights in a model's ``folder`` are no safetensors files of that folder.

    transformers also loads an adapter that lies beside the weights: it is looked at too.

    Args:
        options: those of ``from_pretrained``; ``use_safetensors=False`` asks for a PyTorch file by name, ``gguf_file`` for
            one of another kind, ``variant`` and ``subfolder`` for others that transformers finds itself.
    """
    if (folder / "adapter_config.json").is_file():
        check_adapter(folder)
    if options.get("use_safetensors") is False or options.get("gguf_file") is not None:
        return
    index = folder / _INDEX
    if index.is_file():
        shards = json_object(index).get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else {None}
        for name in names:
            if not isinstance(name, str) or not name.endswith(".safetensors") or name != Path(name).name:
                raise ValueError(
                    f"{index}: it names {name!r} as a file of weights, which is no .safetensors file of this folder. Copy "
                    "the folder again from where it comes from."
                )
    elif not any(folder.glob("*.safetensors")) and (found := _pickled(folder)):
        raise ValueError(
            f"{folder}: its weights are {found}, a PyTorch file, and those hold pickles, which can run code. Save the "
            "model as safetensors (save_pretrained does), or set model_init_kwargs: {use_safetensors: false} to read it."
        )


def check_config(config: Any, name: str, options: Mapping[str, Any]) -> None:
    """ValueError where a model's ``config`` names kernels of a hub, which are machine code, or weights that are a pickle.

    Args:
        config: what AutoConfig read.
        name: how errors call the model.
        options: those of ``from_pretrained``; what the caller asks for there is allowed.
    """
    parts = [config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", {}))]
    for part in parts:
        attention = getattr(part, "_attn_implementation", None)
        if "/" in str(attention or "") and "attn_implementation" not in options:
            raise ValueError(
                f"{name}: its config.json asks for attn_implementation={attention!r}, machine code from a hub. Take that "
                "line out, or set model_init_kwargs: {attn_implementation: ...} if you want it."
            )
    weights = getattr(config, "transformers_weights", None)
    if weights is not None and not str(weights).endswith((".safetensors", ".safetensors.index.json")):
        raise ValueError(
            f"{name}: its config.json names {weights!r} as its weights, which are no safetensors. Take that line out."
        )


def check_adapter(folder: Path) -> None:
    """ValueError where an adapter's ``folder`` has no safetensors, or its config leads to more files than its own.

    And where it was trained on weights that nobody has: LoRA may start from parts of the model's weights and take them out
    of those (``init_lora_weights``). PEFT does that again on loading. pissa and olora depend on the weights alone, and give
    the same again; where chance (pissa_niter_…), gradients (lora_ga) or data (corda) had a part in it, others come out.
    """
    config = folder / "adapter_config.json"
    told = json_object(config)
    kind, start = str(told.get("peft_type")), told.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_UNKNOWN_WEIGHTS):
        raise ValueError(
            f"{config}: init_lora_weights is {start!r}, which changed the model's weights before training in a way that "
            "cannot be done again, so the adapter fits no model that is there. Save it as a plain LoRA: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...) of PEFT, where it was trained."
        )
    if kind in _LEADS_ELSEWHERE:
        raise ValueError(
            f"{config}: a {kind} adapter, whose config names more to load than this folder. Use one whose weights are its "
            "own, such as LORA."
        )
    if (folder / ADAPTER).is_file():
        return
    if (folder / "adapter_model.bin").exists():
        raise ValueError(
            f"{folder}: its weights are adapter_model.bin, a PyTorch file, and those hold pickles, which can run code. "
            f"Save the adapter again with PEFT, which writes {ADAPTER}."
        )
    raise ValueError(f"{folder}: no {ADAPTER} here; the adapter's folder is damaged. Copy it again.")


def _pickled(folder: Path) -> str | None:
    return next((one.name for pattern in _PICKLED for one in sorted(folder.glob(pattern))), None)


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError in one line if it holds none."""
    try:
        found = json.loads(path.read_text("utf8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not valid JSON; the folder is damaged. Copy it again.")
    return found

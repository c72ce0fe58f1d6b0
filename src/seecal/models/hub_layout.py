"""The names of tensors in published checkpoints: what transformers 4 and 5, vLLM and SGLang read alike.

transformers 5 saves a model that it made itself under other names (the tower without its level ``vision_model``), and one
that it loaded under those that it came with.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_OUTER = re.compile(r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.|image_newline$)")
# Families whose names are known here, and towers that the hub has one level lower than transformers 5 has them in memory
FAMILIES = ("llava", "llava_next")
_WITH_LEVEL = ("clip_vision_model", "siglip_vision_model")
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def hub_name(name: str, level: bool = True) -> str:
    """A tensor's name in the hub's layout, from any of transformers' own.

    Those are: what 5.x saves of a model that it made, the hub's, the names in memory, and what 4.52 to 4.57 save.

    Args:
        name: as a file or a state dict has it.
        level: whether the tower has the level ``vision_model`` there, as CLIP's and SigLIP's have.
    """
    name = _OUTER.sub("", name)
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    if re.match(r"language_model\.(?!model\.|lm_head\.)", name):
        return name.replace("language_model.", "language_model.model.", 1)
    if level and re.match(r"vision_tower\.(?!vision_model\.)", name):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name


def has_level(config: Any) -> bool:
    """Whether the hub's layout of a model of this config has the level ``vision_model`` in its tower."""
    return config.vision_config.model_type in _WITH_LEVEL


def save_in_hub_layout(model: Any, folder: Path, max_shard_size: str = "5GB") -> None:
    """``save_pretrained``, and where the family's names are known here, those of the hub, a shard at a time."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if model.config.model_type not in FAMILIES:
        return
    level = has_level(model.config)
    for path in sorted(folder.glob("*.safetensors")):
        _rename(path, level)
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text("utf8"))
        index["weight_map"] = {hub_name(name, level): file for name, file in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf8")


def _rename(path: Path, level: bool) -> None:
    from safetensors.torch import load_file, save_file

    held = load_file(path)
    named = {hub_name(name, level): tensor for name, tensor in held.items()}
    if named.keys() == held.keys():
        return
    aside = path.with_name(path.name + ".part")  # the tensors still lie in the old file
    save_file(named, aside, metadata={"format": "pt"})
    aside.replace(path)

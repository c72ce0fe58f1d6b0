"""Which checkpoint a run can go on from."""

from __future__ import annotations

import fnmatch
import json
import zipfile
from collections.abc import Callable
from pathlib import Path


def newest_checkpoint(folder: Path, say: Callable[[str], None] = lambda text: None) -> Path | None:
    """The last whole checkpoint in a stage's folder; ``say`` is told about later ones that are damaged."""
    found = [one for one in folder.glob("checkpoint-*") if one.name.removeprefix("checkpoint-").isdecimal()]
    for one in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        wrong = damage(one)
        if wrong is None:
            return one
        say(f"{one} is passed over: {wrong}")
    return None


def damage(checkpoint: Path) -> str | None:
    """Why a run cannot go on exactly from this checkpoint; None if it is whole. Only headers and directories are read.

    trainer_state.json is written last. A file that is not there would be passed over in silence by Trainer: without
    optimizer.pt the moments of AdamW start from zero.
    """
    from safetensors import SafetensorError, safe_open

    try:
        json.loads((checkpoint / "trainer_state.json").read_text("utf8"))
    except FileNotFoundError:
        return "trainer_state.json, which is written last, is not there"
    except ValueError:
        return "trainer_state.json is cut off"
    names = {one.name for one in checkpoint.iterdir()}
    weights = ("model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json", "pytorch_model*")
    of_optimizer = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")  # as it is; FSDP; DeepSpeed
    for patterns in (weights, of_optimizer, ("scheduler.pt",), ("rng_state*.pth",)):
        if not any(fnmatch.filter(names, pattern) for pattern in patterns):
            return f"it has no {patterns[0]}"
    index = checkpoint / "model.safetensors.index.json"
    try:
        shards = set(json.loads(index.read_text("utf8"))["weight_map"].values()) if index.name in names else set()
    except (ValueError, KeyError):
        return f"{index.name} is cut off"
    if shards - names:
        return f"{', '.join(sorted(shards - names))} is not there"
    for name in sorted(fnmatch.filter(names, "*.safetensors")):
        try:
            with safe_open(checkpoint / name, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return f"{name} is cut off"
    for name in sorted({*fnmatch.filter(names, "*.pt"), *fnmatch.filter(names, "rng_state*.pth")}):
        if not zipfile.is_zipfile(checkpoint / name):  # its directory is at the end
            return f"{name} is cut off"
    return None

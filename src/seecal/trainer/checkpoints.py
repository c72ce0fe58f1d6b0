"""Checkpoints that are whole or not there: written aside, described by a manifest, renamed; and the newest to go on from.

out/.saving-40/checkpoint-40/   while it is written; what a kill leaves of it is removed at the next save
out/checkpoint-40/              every byte is on the disk, and manifest.json says which
"""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .manifests import check_manifest, size_of, sync_folder, write_manifest

ASIDE = ".saving-"
_ADAPTER = "adapter_model.safetensors"
_SLACK = 64 << 20  # bytes of state, tokenizer and so on that no estimate counts


def newest_checkpoint(folder: Path, say: Callable[[str], None] = lambda text: None) -> Path | None:
    """The last whole checkpoint in a stage's folder, read to the last byte; ``say`` is told about later damaged ones."""
    for one in reversed(checkpoints_in(folder)):
        wrong = damage(one)
        if wrong is None:
            return one
        say(f"{one} is passed over: {wrong}")
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """All of a folder, by their step."""
    found = [one for one in folder.glob("checkpoint-*") if one.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which it was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def damage(checkpoint: Path) -> str | None:
    """Why a run cannot go on exactly from this checkpoint; None if it is whole. Every byte is read."""
    return check_manifest(checkpoint) or lacks(checkpoint) or pickled_weights(checkpoint)


def lacks(checkpoint: Path) -> str | None:
    """What an exact resume needs and this checkpoint was not written with; None if it has all.

    What is not there would be passed over in silence by Trainer: without optimizer.pt the moments of AdamW start from zero.
    """
    names = {one.name for one in checkpoint.iterdir()} | ({_ADAPTER} if has_named_adapters(checkpoint) else set())
    weights = ("model.safetensors", _ADAPTER, "model.safetensors.index.json", "pytorch_model*")
    of_optimizer = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")  # as it is; FSDP; DeepSpeed
    for patterns in (weights, of_optimizer, ("scheduler.pt",), ("rng_state*.pth",), ("trainer_state.json",)):
        if not any(fnmatch.filter(names, pattern) for pattern in patterns):
            return f"it has no {patterns[0]}"
    return None


def has_named_adapters(checkpoint: str | Path) -> bool:
    """Whether it has adapters of other names than "default": PEFT writes each into a folder of its name."""
    return any(Path(checkpoint).glob(f"*/{_ADAPTER}"))


def pickled_weights(checkpoint: Path) -> str | None:
    """That there is a file of weights which PyTorch would have to unpickle; None if there is none.

    Trainer and PEFT take these names where safetensors are not there. FSDP's and DeepSpeed's own files have others.
    """
    named = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
    for one in (one for name in named for one in sorted(checkpoint.rglob(name))):
        return f"its weights are {one.relative_to(checkpoint)}, a PyTorch file, which holds pickles: they can run code"
    return None


# ---- Writing ----


def aside(folder: Path, step: int) -> Path:
    """The folder in which a checkpoint of this step is written, before it has its name."""
    return folder / f"{ASIDE}{step}"


def clear_aside(folder: Path) -> None:
    """Remove what a save that was ended has left."""
    for left in folder.glob(f"{ASIDE}*"):
        shutil.rmtree(left, ignore_errors=True)


def finish(folder: Path, step: int, about: dict[str, Any], beat: Callable[[], Any] = lambda: None) -> Path:
    """Give the checkpoint that lies aside its name, once it is on the disk. ``beat``: called as that makes progress.

    Raises:
        OSError: what was written cannot be read back as it was, or the disk is full.
    """
    written, name = aside(folder, step) / f"checkpoint-{step}", folder / f"checkpoint-{step}"
    write_manifest(written, {"step": step, **about}, beat)
    if name.exists():  # a damaged one, or of a run that went on from before it
        name.replace(aside(folder, step) / "replaced")
    written.replace(name)
    sync_folder(folder)
    shutil.rmtree(aside(folder, step), ignore_errors=True)
    return name


def bytes_needed(folder: Path, model: Any, optimizer: Any, *, trainable_only: bool) -> int:
    """About how large the next checkpoint will be: weights and optimizer state, or the last one where that was larger."""
    saved = [one for one in model.parameters() if one.requires_grad or not trainable_only]
    state = [] if optimizer is None else [one for entry in optimizer.state.values() for one in entry.values()]
    tensors = [one for one in [*saved, *state] if hasattr(one, "numel")]
    before = checkpoints_in(folder)
    return _SLACK + max(sum(one.numel() * one.element_size() for one in tensors), size_of(before[-1]) if before else 0)


def lack_of_room(folder: Path, needed: int) -> str | None:
    """What there is to say where the disk has not ``needed`` bytes free; None where it has."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        return no_room(folder, needed, free)
    return None


def no_room(folder: Path, needed: int, free: int) -> str:
    """What there is to say about a full disk."""
    before = checkpoints_in(folder)
    last = f"The last checkpoint, {before[-1]}, is whole" if before else "There is no earlier checkpoint"
    return (
        f"{folder}: no room for the next checkpoint: about {_gib(needed)} are needed and {_gib(free)} are free, "
        f"{_gib(max(needed - free, 0))} too few. {last}; free some room, or set save_total_limit or output_dir, and resume."
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"

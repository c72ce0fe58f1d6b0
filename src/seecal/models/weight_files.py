"""Weights in files, read a tensor at a time and written a shard at a time: a 13B model needs the memory of one shard."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAMES = ("model.safetensors", "pytorch_model.bin")
# Shards without an index
_SHARDS = ("model*.safetensors", "pytorch_model*.bin", "open_clip*.safetensors", "open_clip*.bin")


@dataclass(frozen=True)
class Lazy:
    """A tensor that is read when it is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Lazy:
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def then(self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> Lazy:
        """The tensor changed after it is read, into ``shape`` where that is another one."""
        return Lazy(shape or self.shape, self.dtype, lambda: change(self.read()))


def folder_of(model: str | Path) -> Path:
    """A model's folder; a hub id is fetched: its config, tokenizer and weights, nothing else."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    if (
        folder.exists()
        or str(model).count("/") != 1
        or str(model).startswith((".", "/", "~"))
        or folder.parent.is_dir()
    ):
        raise ValueError(f"{model}: no such folder. Give a model's folder, or a hub id (owner/name).")
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    wanted = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja"]
    pickled = ["pytorch_model*.bin", "open_clip*.bin"]
    try:
        try:
            there = any(name.endswith(".safetensors") for name in list_repo_files(str(model)))
        except OfflineModeIsEnabled:
            there = False  # what was fetched before
        return Path(snapshot_download(str(model), allow_patterns=wanted if there else [*wanted, *pickled]))
    except (HfHubHTTPError, OSError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"{model}: cannot be fetched from the hub: {first}") from None


def weights_of(folder: Path) -> dict[str, Lazy]:
    """All tensors of a model's folder by name: one file or shards, safetensors or PyTorch's, with or without an index.

    Raises:
        ValueError: no weights, a file that an index names and that is not there, a tensor that its file lacks or that
            two files hold, a damaged file, a pickle that is more than tensors.
    """
    for name in _NAMES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _by_index(index)
        if (folder / name).is_file():
            return weights_in(folder / name)
    for pattern in _SHARDS:
        if found := sorted(folder.glob(pattern)):
            return _together(found)
    raise ValueError(f"{folder}: no weights here (*.safetensors or pytorch_model*.bin). Give the folder that has them.")


def weights_in(path: Path) -> dict[str, Lazy]:
    """The tensors of one file. Nothing of a pickle is run."""
    return _of_safetensors(path) if path.suffix == ".safetensors" else _of_torch(path)


def _by_index(index: Path) -> dict[str, Lazy]:
    try:
        shard_of = json.loads(index.read_text("utf8"))["weight_map"]
        shards = sorted(set(shard_of.values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ValueError(f"{index}: not an index of weights; the folder is damaged. Copy it again.") from None
    for name in shards:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise ValueError(f"{index}: it names {name}, which is not in the folder. Copy the folder again.")
    found = _together([index.parent / name for name in shards])
    if missing := sorted(set(shard_of) - set(found)):
        raise ValueError(f"{index}: it names {missing[0]}, which {shard_of[missing[0]]} does not hold. Copy it again.")
    return found


def _together(paths: list[Path]) -> dict[str, Lazy]:
    found: dict[str, Lazy] = {}
    for path in paths:
        more = weights_in(path)
        if twice := sorted(found.keys() & more.keys()):
            raise ValueError(
                f"{path}: it holds {twice[0]}, which another file of the folder holds too. Keep the files of one saving."
            )
        found |= more
    return found


def _of_safetensors(path: Path) -> dict[str, Lazy]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: cut off or damaged ({error}). Copy it again.") from None
    found = {}
    for name in file.keys():  # noqa: SIM118 (no dict)
        part = file.get_slice(name)
        shape = tuple(part.get_shape())
        dtype = (part[:0] if shape else file.get_tensor(name)).dtype
        found[name] = Lazy(shape, dtype, lambda name=name: file.get_tensor(name))  # type: ignore[misc]
    return found


def _of_torch(path: Path) -> dict[str, Lazy]:
    try:
        try:
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            held = torch.load(path, map_location="cpu", weights_only=True)  # written before PyTorch 1.6
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: it holds more than tensors, and unpickling that could run code, so it is not read. Save its state "
            "dict with torch.save, or as safetensors."
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{path}: cut off, damaged, or no file of PyTorch ({first}). Copy it again.") from None
    if not isinstance(held, dict) or not all(isinstance(one, Tensor) for one in held.values()):
        raise ValueError(f"{path}: no state dict (tensors by name). Give a model's weights.")
    return {str(name): Lazy.of(tensor) for name, tensor in held.items()}


def write_weights(state: Mapping[str, Lazy], folder: Path, max_shard_size: str = "5GB", pickled: bool = False) -> None:
    """The tensors as ``model*.safetensors`` in their order, in shards with an index where one would be larger than asked.

    Args:
        state: what to write.
        folder: where; it is there.
        max_shard_size: of one file, as "5GB".
        pickled: as ``pytorch_model*.bin`` and always with an index: the original code of Mini-Gemini reads nothing else.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    sizes = {name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in state.items()}
    whole = _NAMES[1 if pickled else 0]
    pattern = whole.replace(".", "{suffix}.", 1)
    plan = split_torch_state_dict_into_shards(sizes, filename_pattern=pattern, max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        tensors: dict[str, Any] = {name: state[name].read().detach().contiguous().clone() for name in names}
        for name, tensor in tensors.items():
            assert tuple(tensor.shape) == state[name].shape, f"{name}: read {tuple(tensor.shape)}"
        if pickled:
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if plan.is_sharded or pickled:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{whole}.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf8")

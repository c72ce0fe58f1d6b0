"""What lies in the folders that a conversion reads: checkpoint, projector, LoRA, language model, tokenizer."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import assembly
from ..weight_files import Lazy, folder_of, weights_in, weights_of
from .configs import read_json
from .lora import merged

VOCABULARY_FILES = ("tokenizer.model",)
_TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "generation_config.json"),
)
PROJECTOR_FILE, _REST, _ADAPTER = "mm_projector.bin", "non_lora_trainables.bin", "adapter_config.json"
# What the released stage 1 has, where no config.json says it
_STAGE_1 = {
    "model_type": "llava_llama",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "image_aspect_ratio": "square",
}
_STAGE_1_MGM = {"llama": "mgm", "gemma": "mgm_gemma"}


@dataclass(frozen=True)
class Source:
    """An original checkpoint: its tensors by the original's names, config.json, and where its tokenizer lies."""

    state: dict[str, Lazy]
    config: dict[str, Any]
    tokenizer: Path
    projector_only: bool = False


@dataclass
class Converted:
    """What ``convert`` wrote.

    Attributes:
        folder: where.
        model: its model_type there.
        tensors: how many.
        notes: what was left out, taken from elsewhere, or made up; a line each.
    """

    folder: Path
    model: str
    tensors: int
    notes: list[str] = field(default_factory=list)


def read_source(source: Path, language_model: str | None) -> Source:
    """What ``source`` holds: a whole checkpoint, a projector's file, or LLaVA's LoRA folder.

    Raises:
        ValueError: none of them, or a projector or LoRA without its ``language_model``.
    """
    folder = source if source.is_dir() else source.parent
    if source.is_dir() and (source / _ADAPTER).is_file():
        return _lora(source, language_model)
    projector = source if source.is_file() else source / PROJECTOR_FILE
    if projector.is_file() and (source.is_file() or not _has_weights(source)):
        return _projector(projector, folder, language_model)
    if language_model is not None:
        raise ValueError(f"{source}: a whole checkpoint, with a language model of its own. Leave language_model out.")
    return Source(weights_of(source), read_json(source / "config.json"), source)


def _has_weights(folder: Path) -> bool:
    try:
        weights_of(folder)
    except ValueError as error:
        return "no weights here" not in str(error)
    return True


def _projector(file: Path, folder: Path, language_model: str | None) -> Source:
    tensors = weights_in(file)
    if language_model is None:
        raise ValueError(
            f"{file}: a projector alone. Give the language model that it was trained for: language_model "
            "(--language-model), and the tower: vision_tower (--vision-tower)."
        )
    model = folder_of(language_model)
    text = read_json(model / "config.json")
    if any("vlm_uni" in name for name in tensors):  # Mini-Gemini's has the mining and both towers too
        kind = _STAGE_1_MGM.get(str(text.get("model_type")), "mgm")
        config, named = {**_text_fields(text), "model_type": kind, "image_aspect_ratio": "square"}, tensors
    else:
        config = {**_STAGE_1, "model_type": text.get("model_type", "llama"), **_text_fields(text)}
        # The original's loading splits at "mm_projector." too, whatever stands before it
        named = {f"model.mm_projector.{name.rpartition('mm_projector.')[2]}": one for name, one in tensors.items()}
        if other := sorted(name for name in tensors if "mm_projector." not in name):
            raise ValueError(
                f"{file}: it holds {other[0]}, which is no tensor of a projector. A file that has embeddings too "
                "(mm_use_im_start_end) is not read."
            )
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
    return Source({**weights_of(model), **named}, config, model, projector_only=True)


def _text_fields(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("model_type", "architectures")}


def _lora(folder: Path, language_model: str | None) -> Source:
    rest = folder / _REST
    if not rest.is_file():
        raise ValueError(
            f"{folder}: an adapter without {_REST}, which has the projector of LLaVA's LoRA training. Copy it there; "
            "adapters of PEFT on transformers models are merged by seecal merge."
        )
    if language_model is None:
        raise ValueError(
            f"{folder}: LLaVA's LoRA, which has no language model of its own. Give it: language_model (--language-model)."
        )
    model = folder_of(language_model)
    state = merged(weights_of(model), folder)
    for name, one in weights_in(rest).items():
        state[name.removeprefix("base_model.model.")] = one
    return Source(state, read_json(folder / "config.json"), model)


def resized(state: Mapping[str, Lazy], vocabulary: tuple[str, ...], rows: int) -> dict[str, Lazy]:
    """The state with that many rows in the matrices of its vocabulary: padded, or cut."""
    found = dict(state)
    for name in vocabulary:
        if name in found and found[name].shape[0] != rows:
            change = functools.partial(assembly.pad_rows if found[name].shape[0] < rows else _first_rows, rows=rows)
            found[name] = found[name].then(change, (rows, *found[name].shape[1:]))
    return found


def _first_rows(matrix: Any, rows: int) -> Any:
    return matrix[:rows]


def rows_of_original(kept: dict[str, Any] | None, source: Path, rows: int) -> int:
    """How many rows of a transformers model's vocabulary the original has: as it was told, else those before our tokens."""
    if kept and kept.get("vocab_size"):
        return min(int(kept["vocab_size"]), rows)
    tokenizer = assembly.tokenizer_of(str(source))
    added = tokenizer.get_added_vocab()
    return min([rows, *(added[one] for one in (assembly.PLACEHOLDER, assembly.PAD) if one in added)])


def longest(source: Path, config: Any) -> int:
    """``tokenizer_model_max_length``: the tokenizer's, else the language model's positions."""
    try:
        limit = int(read_json(source / "tokenizer_config.json").get("model_max_length") or 0)
    except (ValueError, OverflowError):
        limit = 0
    # none is written as a very large number
    return limit if 0 < limit <= 1_000_000 else int(config.text_config.max_position_embeddings)


def copy_vocabulary(source: Path, part: Path) -> None:
    """The file that the original code's tokenizer is made from, so that the way back can copy it."""
    for name in VOCABULARY_FILES:
        if (source / name).is_file() and not (part / name).exists():
            shutil.copyfile(source / name, part / name)


def original_tokenizer(source: Path, part: Path, rows: int, cut: bool) -> list[str]:
    """The tokenizer's files for the original code, where it is ``cut`` without the tokens from ``rows`` on; notes on it."""
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, part / name)
    if not cut:
        return [f"tokenizer: from {source}"]
    gone: set[str] = set()
    if (part / "tokenizer.json").is_file():
        whole = read_json(part / "tokenizer.json")
        gone |= {one["content"] for one in whole.get("added_tokens", []) if one["id"] >= rows}
        whole["added_tokens"] = [one for one in whole.get("added_tokens", []) if one["id"] < rows]
        _write_json(part / "tokenizer.json", whole)
    if (part / "tokenizer_config.json").is_file():
        decoder = read_json(part / "tokenizer_config.json").get("added_tokens_decoder") or {}
        gone |= {str(_text(what)) for one, what in decoder.items() if int(one) >= rows}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"):
        if (part / name).is_file():
            _write_json(part / name, _without(read_json(part / name), gone, rows))
    there = (part / VOCABULARY_FILES[0]).is_file()
    slow = (
        "" if there else "; no tokenizer.model, which LLaVA's slow tokenizer reads: language_model names where it lies"
    )
    return [f"tokenizer: without {', '.join(sorted(gone))}{slow}"]


def _without(config: dict[str, Any], gone: set[str], rows: int) -> dict[str, Any]:
    """A tokenizer's JSON without the tokens ``gone``; what pads with one of them pads with the unknown token."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if name == "added_tokens_decoder":
            value = {one: what for one, what in value.items() if int(one) < rows}
        elif name in ("additional_special_tokens", "extra_special_tokens") and isinstance(value, list):
            value = [one for one in value if _text(one) not in gone]
        elif name == "pad_token" and _text(value) in gone:
            value = config.get("unk_token")
        elif name in ("pad_token_id", "processor_class", "chat_template", "image_token") or name in gone:
            continue  # the last: in added_tokens.json
        found[name] = value
    return found


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf8")

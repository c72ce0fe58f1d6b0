"""Texts in which one image is hundreds of equal tokens, tokenised without reading each of them.

    tokenizer(texts, padding=True, return_tensors="pt")          # 0.8 ms for 576 image tokens, ten times that for 2,880

A special token is cut out of a text before anything else happens to it, so a run of k equal ones becomes its id k times,
and the text around is tokenised as it is around a single one.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import wrapt
from transformers import BatchEncoding

# What a processor may pass on with the texts; with anything else the tokenizer itself is called.
_KNOWN = {"padding", "padding_side", "pad_to_multiple_of", "add_special_tokens", "return_tensors"}


@contextlib.contextmanager
def short_runs(
    processor: Any, image_ids: list[int], known: dict[tuple[str, bool], list[int]] | None = None
) -> Iterator[None]:
    """While it is open, ``processor`` tokenises runs of its image tokens in one go. The ids are the same.

    ``known`` has the ids of texts that were tokenised before, by text and add_special_tokens.
    """
    if not image_ids:
        yield
        return
    tokenizer = processor.tokenizer
    found = _ShortRuns(
        tokenizer, dict(zip(image_ids, tokenizer.convert_ids_to_tokens(image_ids), strict=True)), known or {}
    )
    if set(tokenizer.model_input_names) != {"input_ids", "attention_mask"} or not found.agrees():
        yield
        return
    processor.tokenizer = found
    try:
        yield
    finally:
        processor.tokenizer = tokenizer


class _ShortRuns(wrapt.ObjectProxy):
    def __init__(self, tokenizer: Any, tokens: dict[int, str], known: dict[tuple[str, bool], list[int]]) -> None:
        super().__init__(tokenizer)
        self._self_known = known
        self._self_ids = list(tokens)
        self._self_runs = re.compile("|".join(f"(?:{re.escape(token)})+" for token in tokens.values()))
        self._self_tokens = list(tokens.values())

    def __call__(self, text: Any = None, *pair: Any, **options: Any) -> BatchEncoding:
        plain = self.__wrapped__
        if pair:
            return plain(text, *pair, **options)
        ours = isinstance(text, list) and options.get("padding") is True and options.get("return_tensors") == "pt"
        if not ours or not {name for name, value in options.items() if value not in (None, False)} <= _KNOWN:
            return plain(text, **options)
        rows = [self._ids(row_text, options.get("add_special_tokens", True)) for row_text in text]
        if any(row is None for row in rows):
            return plain(text, **options)
        return _padded(plain, rows, options)

    def agrees(self) -> bool:
        """Whether the tokenizer cuts image tokens out before all else: the one assumption here, tried on a short text."""
        tried = "".join(f"a {token * 3} b{token}\n{token * 2}c" for token in self._self_tokens)
        found = self._ids(tried, False)
        return found is not None and found.tolist() == self.__wrapped__(tried, add_special_tokens=False)["input_ids"]

    def _ids(self, text: str, special: bool) -> np.ndarray | None:
        """The ids of one text; None if what became of its image tokens is not what it should be."""
        counts: list[int] = []

        def first(run: re.Match) -> str:
            token = next(token for token in self._self_tokens if run[0].startswith(token))
            counts.append(len(run[0]) // len(token))
            return token

        short = self._self_runs.sub(first, text)
        found = self._self_known.get((short, special))
        if found is None:
            found = self.__wrapped__(short, add_special_tokens=special)["input_ids"]
        ids = np.array(found, dtype=np.int64)
        repeats, places = np.ones(len(ids), dtype=np.int64), np.isin(ids, self._self_ids)
        if places.sum() != len(counts):
            return None
        repeats[places] = counts
        return ids.repeat(repeats)


def _padded(tokenizer: Any, rows: list[Any], options: dict[str, Any]) -> BatchEncoding:
    multiple = options.get("pad_to_multiple_of") or 1
    width = -(-max(len(row) for row in rows) // multiple) * multiple
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    left = (options.get("padding_side") or tokenizer.padding_side) == "left"
    for number, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, columns], mask[number, columns] = torch.from_numpy(row), 1
    return BatchEncoding({"input_ids": ids, "attention_mask": mask})

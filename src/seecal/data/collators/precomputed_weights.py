"""Weights of label tokens that were measured before and come with the records. B rows, L columns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...constants import IGNORE_INDEX


def precomputed_weights(
    records: Sequence[Mapping[str, Any]], names: Sequence[str], labels_BL: Tensor, left_out: Collection[int]
) -> Tensor | None:
    """[B, L] float32: the records' ``weights`` at their label tokens, 0 elsewhere. None where no record has any.

    Args:
        names: what errors call the records.
        labels_BL: before anything is cut.
        left_out: rows that take no part, whose weights are not looked at.

    Raises:
        ValueError: a record whose weights are not one finite number ≥ 0 for each label token, or belong to other tokens
            (``weight_ids``), or that has none while others do; names it.
    """
    if all(record.get("weights") is None for record in records):
        return None
    found = torch.zeros(labels_BL.shape)
    for row, (record, name) in enumerate(zip(records, names, strict=True)):
        if row in left_out:
            continue
        places, weights = labels_BL[row] != IGNORE_INDEX, record.get("weights")
        count = int(places.sum())
        if weights is None or len(weights) != count:
            has = "no weights" if weights is None else f"{len(weights)} weights"
            raise ValueError(
                f"{name}: {has} for {count} label tokens. Give one for each token of its assistant turns and of what "
                "ends them, in order, in every record or in none."
            )
        ids = record.get("weight_ids")
        if ids is not None and list(ids) != labels_BL[row, places].tolist():
            raise ValueError(
                f"{name}: its weights were measured for other tokens than its labels. Score the data again, with this "
                "processor and chat template."
            )
        values = torch.tensor(weights, dtype=torch.float32)
        if not bool((values.isfinite() & (values >= 0)).all()):
            raise ValueError(f"{name}: its weights must be finite and not negative")
        found[row, places] = values
    return found

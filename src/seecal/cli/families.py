"""``seecal families``: the table of families, and the self-test on somebody's own checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..core.enable import visual_delta
from ..core.self_test import Verdict, self_test
from ..core.state import keep, state_of
from ..families.synthetic_batch import synthetic_batch
from ..families.table import FAMILIES, GENERIC, Family, check_vlm, family_of, unwrap

COLUMNS = ("family", "without the image", "dropping = masking", "padding-free", "processor and batches need")


def table() -> list[tuple[str, ...]]:
    """One row a family, under ``COLUMNS``."""
    return [
        (name, _route(row), "yes" if row.exact else f"no: {row.note}", _padding_free(row), row.needs)
        for name, row in _sorted()
    ]


def brief() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(columns, rows) that fit a screen; what stands behind a "no" is in :func:`notes`."""
    columns = ("family", "route", "exact", *COLUMNS[-2:])
    rows: list[tuple[str, ...]] = [
        (name, _route(row), "yes" if row.exact else "no", _padding_free(row), row.needs) for name, row in _sorted()
    ]
    return columns, rows


def _sorted() -> list[tuple[str, Family]]:
    return sorted(FAMILIES.items())


def _route(row: Family) -> str:
    return "no cross-attention" if row.cross_attention else "text tokens alone"


def _padding_free(row: Family) -> str:
    """Which passes may run on one row without padding."""
    if row.packs_main:
        return "yes"
    return "contrast only" if row.packs else "no"


def notes() -> list[str]:
    """For each family on which dropping is not masking, what it is."""
    return [f"{name}: {row.note}." for name, row in _sorted() if not row.exact]


def check(model: Any) -> tuple[Verdict, str]:
    """(what the self-test found, the verdict in one or two lines) on a batch made up for the model.

    Args:
        model: a loaded vision-language model; it is put into eval mode.

    Raises:
        ValueError: no vision-language model, or no batch can be made up for it.
    """
    check_vlm(model)
    row = family_of(model)
    batch = synthetic_batch(model.eval())
    state = state_of(model)
    # The test is ours here: visual_delta would refuse what we are to report
    keep(model, dataclasses.replace(state, tested=True))
    verdict = self_test(lambda inputs, contrast: visual_delta(model, inputs, contrast=contrast), batch, unwrap(model))
    keep(model, state)
    assert verdict is not None, "the made-up batch has label tokens after an image"
    name = model.config.model_type
    if row is GENERIC:
        lines = f"{name}: not declared, goes by the generic row. On this checkpoint {verdict.sentence()}."
    elif row.exact:
        lines = f"{name}: declared exact. On this checkpoint {verdict.sentence()}."
    else:
        lines = f"{name}: declared with a definition of its own ({row.note}). On this checkpoint {verdict.sentence()}."
    return verdict, lines

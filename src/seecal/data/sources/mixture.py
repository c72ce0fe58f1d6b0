"""Several data sets as one, each drawn with its own probability."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value, interleave_datasets

from .records import FEATURES

STOPPING = ("all_exhausted", "first_exhausted", "all_exhausted_without_replacement")
_MOST_DRAWS = 10_000_000  # that are made one by one to count them
_MIXED = Features({**FEATURES, "source": Value("string")})


def mix(
    datasets: Mapping[str, Dataset | IterableDataset],
    weights: Mapping[str, float] | Sequence[float] | None = None,
    *,
    seed: int = 0,
    stopping: str = "all_exhausted",
) -> Dataset | IterableDataset:
    """The records of ``datasets`` in one set, each next one drawn from set i with probability weights[i] / Σ weights.

    Args:
        datasets: by name, what :func:`seecal.load_records` returns; all of them streaming, or none. A set
            keeps its own order: shuffle it before, or let the trainer shuffle the mixture.
        weights: one positive number each, by name or in the order of ``datasets``. None: by size, which needs sets with
            a length.
        seed: of the draws. The same seed gives the same mixture.
        stopping: when to end. ``"all_exhausted"``: every record was drawn at least once, and small sets with large weights
            are repeated. ``"first_exhausted"``: one set has run out; nothing is repeated, and others are cut.
            ``"all_exhausted_without_replacement"``: every record once; a set that has run out is no longer drawn, so
            the weights hold only until then.

    Returns:
        The records with one more column, ``source``, the name of the set that each came from: counting it gives what was
        drawn (``collections.Counter(mixture["source"])``).

    Raises:
        ValueError: no set; weights that are not one positive number each; sets that stream and sets that do not; columns
            that are not a record's; an unknown ``stopping``. Names the set.
    """
    if not isinstance(datasets, Mapping) or not datasets:
        raise ValueError("datasets: a dict of name → data set is needed, with one set at least")
    if stopping not in STOPPING:
        raise ValueError(f"stopping={stopping!r}: expected one of {', '.join(STOPPING)}")
    for name, dataset in datasets.items():
        columns = dataset.column_names if isinstance(dataset, (Dataset, IterableDataset)) else None
        if columns is not None and "weights" in columns:
            raise ValueError(
                f"set {name!r} brings weights of its tokens, which a mixture does not carry. Train it alone, or load it "
                "with columns={'weights': None, 'weight_ids': None}."
            )
        if columns is None or set(columns) != set(FEATURES):
            has = type(dataset).__name__ if columns is None else f"columns {', '.join(columns)}"
            raise ValueError(f"set {name!r}: {has}; records are needed. Pass it through seecal.load_records.")
    streaming = {name: isinstance(dataset, IterableDataset) for name, dataset in datasets.items()}
    if len(set(streaming.values())) > 1:
        names = ", ".join(repr(name) for name, yes in streaming.items() if yes)
        raise ValueError(f"{names} streams and the others do not. Load all with streaming=True, or all without.")
    named = [_named(dataset, name) for name, dataset in datasets.items()]
    probabilities = _probabilities(datasets, weights)
    return interleave_datasets(named, probabilities, seed=seed, stopping_strategy=stopping)  # type: ignore[arg-type]


def drawn(lengths: Sequence[int], weights: Sequence[float], *, seed: int) -> list[int]:
    """How many records :func:`mix` draws of each set, by these weights, until every record was drawn ("all_exhausted").

    Counted on the draws that ``datasets`` makes, in blocks of a thousand; of more than ten million the expectation.
    """
    total = math.fsum(weights)
    shares = [weight / total for weight in weights]
    expected = max(length / share for length, share in zip(lengths, shares, strict=True))
    if expected > _MOST_DRAWS:
        return [round(expected * share) for share in shares]
    random, sets, counts = np.random.default_rng(seed), np.arange(len(shares)), np.zeros(len(shares), np.int64)
    while True:
        draws = random.choice(len(shares), size=1000, p=shares)
        running = counts + np.cumsum(draws[:, None] == sets, axis=0)
        whole = (running >= np.asarray(lengths)).all(axis=1)
        if whole.any():
            return [int(one) for one in running[whole.argmax()]]
        counts = running[-1]


def _probabilities(datasets: Mapping[str, Any], weights: Mapping[str, float] | Sequence[float] | None) -> list[float]:
    names = list(datasets)
    if weights is None:
        if any(isinstance(dataset, IterableDataset) for dataset in datasets.values()):
            raise ValueError(
                "weights=None means by size, and a set that streams has none. Give one number for each set."
            )
        weights = [len(dataset) for dataset in datasets.values()]
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise ValueError(
                f"weights for {', '.join(map(repr, weights))}, but the sets are {', '.join(map(repr, names))}"
            )
        weights = [weights[name] for name in names]
    if len(weights) != len(names):
        raise ValueError(
            f"{len(weights)} weights for {len(names)} sets ({', '.join(map(repr, names))}): give one for each"
        )
    for name, weight in zip(names, weights, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise ValueError(
                f"weight {weight!r} of set {name!r}: a positive number is needed. Leave out a set with none."
            )
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _named(data: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    if isinstance(data, Dataset):
        return data.add_column("source", [name] * len(data))  # type: ignore[call-arg]
    return data.map(partial(_with_source, name=name), features=_MIXED)


def _with_source(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {**record, "source": name}

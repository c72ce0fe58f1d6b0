"""Bytes on each GPU, part by part, for each way of launching that has a file in ``recipes/accelerate``.

P trained numbers, F frozen ones, n GPUs, w bytes of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9
# The order in which they are tried: what needs least of the network first
ENGINES = ("single", "ddp", "fsdp2", "zero2", "zero3")
# DeepSpeed's defaults: stage3_max_live_parameters, and the reduce and all-gather buckets, in numbers
LIVE, BUCKET = 1e9, 5e8
_HALF, _FULL = 2, 4
# Bytes of an optimizer's state for a weight of w bytes: moments as wide as the weight, or quantised in blocks of 256
_QUANTISED = 1 + _FULL / 256
_STATES = {
    "adamw": lambda width: 2 * width,
    "adamw_8bit": lambda width: 2 * _QUANTISED,
    "lion": lambda width: width,
    "lion_8bit": lambda width: _QUANTISED,
    "sgd": lambda width: 0,
    "adafactor": lambda width: 0,
}


@dataclass(frozen=True)
class Counts:
    """Numbers in a model's parameters.

    Attributes:
        all: of everything.
        trained: of what trains.
        adapters: of these, those of adapters, which PEFT keeps in float32 on any model.
        layer: of one layer of the decoder.
        outside: of all that is in no layer of the decoder.
        packed: of the frozen ones, those kept in 4 bits.
        packed_bytes: what they take.
    """

    all: int
    trained: int
    layer: int
    outside: int
    adapters: int = 0
    packed: int = 0
    packed_bytes: float = 0.0

    @property
    def frozen(self) -> int:
        """Without those in 4 bits."""
        return self.all - self.trained - self.packed


@dataclass(frozen=True)
class Precision:
    """How the numbers are kept.

    Attributes:
        width: bytes of a weight as it is loaded.
        bf16: whether products are made in bfloat16.
        optimizer: as :func:`optimizer_named` calls it.
    """

    width: int = _FULL
    bf16: bool = True
    optimizer: str = "adamw"

    def casts(self, width: int) -> int:
        """Bytes of autocast's copy of a trained weight of that width."""
        return _HALF if self.bf16 and width > _HALF else 0

    def state(self, width: int) -> float:
        return float(_STATES[self.optimizer](width))


def optimizer_named(optim: str) -> str | None:
    """The kind of optimizer that a recipe's ``optim`` is, by what it keeps; None: not known."""
    name = optim.removeprefix("paged_")
    if name.startswith("adamw"):
        return "adamw_8bit" if "8bit" in name else "adamw"
    if name.startswith("lion"):
        return "lion_8bit" if "8bit" in name else "lion"
    return name if name in _STATES else None


@dataclass(frozen=True)
class Held:
    """Bytes on one GPU that stay from step to step, and what the engine needs beside them."""

    weights: float
    gradients: float
    optimizer: float
    communication: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.communication


def held(engine: str, counts: Counts, gpus: int, precision: Precision) -> Held:
    """What weights, gradients and optimizer take on each of ``gpus``.

    single, ddp: weights w, gradients w, autocast's copy 2, DDP's buckets w. fsdp2: what trains is held in float32 whatever
    its dtype, and gathered in bfloat16: what is outside the layers and two layers, gradients of one. zero2, zero3: weights
    in bfloat16; gradients 2 and their float32 copy 4; master weights 4; DeepSpeed's buckets.
    """
    return _ENGINES[engine](counts, gpus, precision)


def _whole(counts: Counts, gpus: int, precision: Precision, buckets: bool) -> Held:
    width, plain = precision.width, counts.trained - counts.adapters
    own = width * plain + _FULL * counts.adapters
    casts = precision.casts(width) * plain + precision.casts(_FULL) * counts.adapters
    return Held(
        weights=own + width * counts.frozen + casts + counts.packed_bytes,
        gradients=own,
        optimizer=precision.state(width) * plain + precision.state(_FULL) * counts.adapters,
        communication=own if buckets else 0,
    )


def _fsdp2(counts: Counts, gpus: int, precision: Precision) -> Held:
    trained = counts.trained
    gathered = _HALF * (counts.outside + 2 * counts.layer)
    reduced = _HALF * min(counts.outside + counts.layer, trained)
    return Held(
        weights=(_FULL * trained + precision.width * counts.frozen + counts.packed_bytes) / gpus,
        gradients=_FULL * trained / gpus,
        optimizer=precision.state(_FULL) * trained / gpus,
        communication=gathered + reduced,
    )


def _zero(counts: Counts, gpus: int, precision: Precision, spread_weights: bool) -> Held:
    trained = counts.trained
    half = _HALF * (trained + counts.frozen) + counts.packed_bytes
    return Held(
        weights=(half / gpus if spread_weights else half) + _FULL * trained / gpus,
        gradients=(_HALF + _FULL) * trained / gpus,
        optimizer=precision.state(_FULL) * trained / gpus,
        communication=(_HALF * LIVE if spread_weights else 0) + 2 * _HALF * BUCKET,
    )


_ENGINES = {
    "single": lambda counts, gpus, precision: _whole(counts, gpus, precision, buckets=False),
    "ddp": lambda counts, gpus, precision: _whole(counts, gpus, precision, buckets=True),
    "fsdp2": _fsdp2,
    "zero2": lambda counts, gpus, precision: _zero(counts, gpus, precision, spread_weights=False),
    "zero3": lambda counts, gpus, precision: _zero(counts, gpus, precision, spread_weights=True),
}


def between_layers_width(engine: str, precision: Precision) -> int:
    """Bytes of a number in what stands between two layers: as wide as the word table, or gathered in bfloat16."""
    if engine in ("single", "ddp"):
        return precision.width
    return _HALF

"""What one token costs in a model's decoder and one image in its tower: operations, and bytes held.

Measured on the model without storage, layer by layer, with what trains and what is frozen as in the stage. n tokens of a
row, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..families.dummy_images import features
from ..families.table import decoder_of, head_of
from ..trainer.frozen_tower import forward_only
from .storageless import Counted, counting_bytes, counting_flops, storageless

_ROW = 64  # tokens of the shorter of the two rows that are run


@dataclass(frozen=True)
class Flops:
    """Operations of a pass over a row of n tokens: ``token``·n + ``pair``·n²."""

    token: float = 0.0
    pair: float = 0.0

    def of(self, tokens: float, keys: float | None = None) -> float:
        """Over ``tokens`` that look at ``keys`` (None: at each other)."""
        return self.token * tokens + self.pair * tokens * (tokens if keys is None else keys)


@dataclass(frozen=True)
class Bytes:
    """Of one token, or of one record's images.

    Attributes:
        kept: held from the forward to the backward.
        working: made and dropped again in the backward, at most.
    """

    kept: float = 0.0
    working: float = 0.0


@dataclass(frozen=True)
class DecoderCost:
    """The text decoder. Bytes are those of a token.

    Attributes:
        forward, backward: operations.
        recomputed: operations more in the backward under gradient checkpointing. Not all of a layer: it ends once all that
            the backward needs is there again.
        plain, checkpointed: what is held without and with gradient checkpointing.
        alone: what a forward without gradients works with.
        between: what stands between two layers.
        key_values: the keys and values of all layers, one head of each group.
        count: how many layers.
    """

    forward: Flops
    backward: Flops
    recomputed: Flops
    plain: Bytes
    checkpointed: Bytes
    alone: float
    between: float
    key_values: float
    count: int


@dataclass(frozen=True)
class ImageCost:
    """Tower and projector on the images of one record.

    Attributes:
        tokens: features, which stand for as many tokens in the text.
        forward, backward, recomputed: operations, as of the decoder.
        plain, checkpointed: what is held, as of the decoder.
        forward_peak: what the forward works with, at most.
        pixels: bytes of the vision inputs.
    """

    tokens: int
    forward: float
    backward: float
    recomputed: float
    plain: Bytes
    checkpointed: Bytes
    forward_peak: float
    pixels: float


@dataclass(frozen=True)
class HeadCost:
    """The vocabulary projection."""

    width: int
    vocabulary: int
    trains: bool

    @property
    def flops(self) -> float:
        """Of one product of one row."""
        return 2.0 * self.width * self.vocabulary


def head_cost(model: Any) -> HeadCost:
    weight = head_of(model).weight
    return HeadCost(weight.shape[1], weight.shape[0], weight.requires_grad)


def image_tokens(model: Any, inputs: Mapping[str, Tensor]) -> int:
    """How many features the images give, and so tokens in the text."""
    with storageless(), torch.no_grad():
        return sum(_rows(part) for part in features(model, dict(inputs)))


def _rows(part: Tensor) -> int:
    return part.reshape(-1, part.shape[-1]).shape[0]


def image_cost(model: Any, inputs: Mapping[str, Tensor]) -> ImageCost:
    """Of the images whose tensors (on the CPU, as the processor makes them) these are."""

    def run() -> Tensor:
        return torch.stack([part.float().sum() for part in features(model, dict(inputs))]).sum()

    plain = _Passes.of(model, run)
    with checkpointed(model):
        again = _Passes.of(model, run)
    size = next(model.parameters()).element_size()
    return ImageCost(
        image_tokens(model, inputs),
        plain.forward.flops,
        plain.backward.flops,
        again.backward.flops - plain.backward.flops,
        plain.bytes(),
        again.bytes(),
        plain.forward.peak,
        sum(value.numel() for value in inputs.values() if value.is_floating_point()) * size,
    )


def decoder_cost(model: Any) -> DecoderCost:
    """Measured on rows of two lengths: one layer of each kind, and what lies around them.

    Raises:
        ValueError: a decoder that cannot be run without numbers, such as a mixture of experts, which looks at them.
    """
    decoder = decoder_of(model)
    name, layers = layer_list(decoder)
    parent, leaf = decoder.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    try:
        found = []
        for layer, count in _kinds(layers):
            # What one more costs: what stands after the last layer is not kept as what stands between two is
            setattr(parent, leaf, nn.ModuleList([layer]))
            one = _Fit.of(model, decoder)
            setattr(parent, leaf, nn.ModuleList([layer, layer]))
            two = _Fit.of(model, decoder)
            found.append((one, two, count))
    # What the code of a decoder raises where it reads numbers that a tensor without storage has not
    except (RuntimeError, NotImplementedError, AttributeError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{model.config.model_type}: its decoder cannot be measured without numbers in it: {reason}"
        ) from None
    finally:
        setattr(parent, leaf, layers)
    one, two, _ = found[0]
    total = one.plus(one, 1).plus(two, -1)  # what lies around the layers
    for one, two, count in found:
        total = total.plus(two, count).plus(one, -count)
    text = model.config.get_text_config()
    size = next(decoder.parameters()).element_size()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return DecoderCost(
        Flops(total.forward, total.forward_pair),
        Flops(total.backward, total.backward_pair),
        Flops(total.again - total.backward, total.again_pair - total.backward_pair),
        Bytes(total.kept, max(two.working for _, two, _ in found)),
        Bytes(total.kept_again, max(two.working_again for _, two, _ in found)),
        max(two.alone for _, two, _ in found),
        text.hidden_size * size,
        2.0 * heads * width * size * len(layers),
        len(layers),
    )


def layer_list(module: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, list) of a module's layers: the ModuleList with the most parameters."""
    lists = [(name, one) for name, one in module.named_modules() if isinstance(one, nn.ModuleList)]
    if not lists:
        return "", nn.ModuleList()
    return max(lists, key=lambda entry: sum(parameter.numel() for parameter in entry[1].parameters()))


def _kinds(layers: nn.ModuleList) -> list[tuple[nn.Module, int]]:
    """One layer of each kind and how many are like it: same modules, same shapes, same parameters that train."""
    kinds: dict[Any, list[Any]] = {}
    for layer in layers:
        shapes = tuple((name, tuple(one.shape), one.requires_grad) for name, one in layer.named_parameters())
        kinds.setdefault((type(layer), shapes), []).append(layer)
    return [(alike[0], len(alike)) for alike in kinds.values()]


@dataclass(frozen=True)
class _Passes:
    """A forward and its backward."""

    forward: Counted
    backward: Counted

    @classmethod
    def of(cls, model: Any, run: Callable[[], Tensor]) -> _Passes:
        """``run`` gives a scalar."""
        forward, backward = Counted(), Counted()
        for counting in (counting_flops, counting_bytes):
            with counting() as before:
                total = run()
            forward = _both(forward, before)  # taken now, because the backward frees it
            if total.requires_grad:
                with counting() as after:
                    total.backward()
                model.zero_grad(set_to_none=True)
                backward = _both(backward, after)
            del total
        return cls(forward, backward)

    def bytes(self) -> Bytes:
        return Bytes(self.forward.kept, self.backward.peak)


def _both(one: Counted, other: Counted) -> Counted:
    return Counted(one.flops + other.flops, one.kept + other.kept, one.peak + other.peak)


@dataclass(frozen=True)
class _Fit:
    """What a decoder costs a token, from rows of two lengths; operations also a pair of tokens."""

    forward: float
    forward_pair: float
    backward: float
    backward_pair: float
    again: float
    again_pair: float
    kept: float
    working: float
    kept_again: float
    working_again: float
    alone: float

    @classmethod
    def of(cls, model: Any, decoder: Any) -> _Fit:
        rows = (_ROW, 2 * _ROW)
        runs = [_Passes.of(model, partial(_run, model, decoder, row)) for row in rows]
        with checkpointed(model):
            again = [_Passes.of(model, partial(_run, model, decoder, row)) for row in rows]
        alone = []
        for row in rows:
            with counting_bytes() as counted, torch.no_grad():
                _run(model, decoder, row)
            alone.append(counted.peak)
        return cls(
            *_split(*(run.forward.flops for run in runs)),
            *_split(*(run.backward.flops for run in runs)),
            *_split(*(run.backward.flops for run in again)),
            *(
                (long - short) / _ROW
                for short, long in (
                    [run.forward.kept for run in runs],
                    [run.backward.peak for run in runs],
                    [run.forward.kept for run in again],
                    [run.backward.peak for run in again],
                    alone,
                )
            ),
        )

    def plus(self, other: _Fit, times: int) -> _Fit:
        return _Fit(*(getattr(self, one.name) + times * getattr(other, one.name) for one in fields(_Fit)))


def _split(short: float, long: float) -> tuple[float, float]:
    """(a token, a pair) of the costs of rows of ``_ROW`` and twice as many tokens."""
    pair = (long - 2 * short) / (2 * _ROW**2)
    return short / _ROW - pair * _ROW, pair


def _run(model: Any, decoder: Any, tokens: int) -> Tensor:
    """A forward over one row. Its input needs a gradient, as that of every layer but perhaps the first does."""
    weight = next(decoder.parameters())
    width = model.config.get_text_config().hidden_size
    embeds = torch.empty(1, tokens, width, dtype=weight.dtype, device="meta", requires_grad=True)
    positions = torch.arange(tokens, device="meta")[None]
    hidden: Tensor = decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False)[0]
    return hidden.sum()


@contextlib.contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """Inside the block every layer is checkpointed, as CALTrainer does it: a frozen tower is not run backwards."""
    # transformers renamed it in 5.23
    on = getattr(model, "activation_checkpointing_enable", None)
    if on is not None:
        on(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        with forward_only(model):
            yield
    finally:
        (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
        model.disable_input_require_grads()  # which the line before leaves on

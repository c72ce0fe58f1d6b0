"""What one token costs in a model's decoder and one image in its tower: operations, and bytes kept for the backward.

Measured on the model without storage, layer by layer, with what trains and what is frozen as in the stage. n tokens of a
row, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..families.dummy_images import features
from ..families.module_groups import module_groups
from ..families.table import decoder_of, head_of
from .storageless import Counted, counting

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
class DecoderCost:
    """The text decoder.

    Attributes:
        forward, backward: operations; what is recomputed under gradient checkpointing is one more ``layers``.
        layers: the part of ``forward`` that lies in the layers.
        saved: bytes a token kept for the backward, in all.
        layer: bytes a token that the largest layer keeps.
        between: bytes a token of what stands between two layers, the input of one.
        count: how many layers.
        key_values: bytes a token of the keys and values of all layers, one head of each group.
    """

    forward: Flops
    backward: Flops
    layers: Flops
    saved: float
    layer: float
    between: float
    count: int
    key_values: float


@dataclass(frozen=True)
class ImageCost:
    """Tower and projector on the images of one record.

    Attributes:
        tokens: features, which stand for as many tokens in the text.
        forward, backward: operations.
        layers: operations of the tower's own forward, computed again under checkpointing where it trains.
        saved: bytes kept for the backward.
        layer: bytes that one layer of the tower works with.
        between: bytes of the inputs of all its layers.
        tower_trains: whether anything in the tower does.
        features: bytes of the features and the pixels.
    """

    tokens: int
    forward: float
    backward: float
    layers: float
    saved: float
    layer: float
    between: float
    tower_trains: bool
    features: float


@dataclass(frozen=True)
class HeadCost:
    """The vocabulary projection: ``flops`` of one product a row, and its sizes."""

    width: int
    vocabulary: int
    trains: bool

    @property
    def flops(self) -> float:
        return 2.0 * self.width * self.vocabulary


def head_cost(model: Any) -> HeadCost:
    weight = head_of(model).weight
    return HeadCost(weight.shape[1], weight.shape[0], weight.requires_grad)


def decoder_cost(model: Any) -> DecoderCost:
    """Measured on rows of two lengths: one layer of each kind, and what lies around them.

    Raises:
        ValueError: a decoder that cannot be run without numbers, such as a mixture of experts, which looks at them.
    """
    decoder = decoder_of(model)
    name, layers = layer_list(decoder)
    parent = decoder.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    kinds = _kinds(layers)
    try:
        setattr(parent, leaf, nn.ModuleList())
        around = _Fit.of(model, decoder)
        found = []
        for representative, count in kinds:
            setattr(parent, leaf, nn.ModuleList([representative]))
            found.append((_Fit.of(model, decoder).minus(around), count))
    except (RuntimeError, NotImplementedError, AttributeError, TypeError, IndexError) as error:
        raise ValueError(
            f"{model.config.model_type}: its decoder cannot be measured without numbers in it: {str(error).splitlines()[0]}"
        ) from None
    finally:
        setattr(parent, leaf, layers)
    total = around
    for one, count in found:
        total = total.plus(one, count)
    text = model.config.get_text_config()
    size = next(decoder.parameters()).element_size()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return DecoderCost(
        total.forward,
        total.backward,
        Flops(total.forward.token - around.forward.token, total.forward.pair),
        total.saved,
        max(one.saved for one, _ in found),
        text.hidden_size * size,
        len(layers),
        2.0 * heads * width * size * len(layers),
    )


def image_cost(model: Any, inputs: Mapping[str, Tensor]) -> ImageCost:
    """Of the images whose tensors (on the CPU, as the processor makes them) these are."""
    groups = module_groups(model)
    tower = [model.get_submodule(path) for path in groups["vision_tower"]]
    inner = [parameter for one in tower for parameter in one.parameters()]
    trains = any(parameter.requires_grad for parameter in inner)
    with counting(model) as forward:
        tokens, width, _ = _features(model, inputs)
    with counting(model) as both:
        _, _, total = _features(model, inputs)
        if total.requires_grad:
            total.backward()
    # What the layers of the tower work with shows in what they would keep if they trained
    needed = [parameter.requires_grad for parameter in inner]
    between, whole = _between_layers(model, tower, inner, inputs)
    for parameter, before in zip(inner, needed, strict=True):
        parameter.requires_grad_(before)
    count = sum(len(layer_list(one)[1]) for one in tower)
    pixels = sum(value.numel() for value in inputs.values() if value.is_floating_point())
    size = next(model.parameters()).element_size()
    return ImageCost(
        tokens,
        forward.flops,
        both.flops - forward.flops,
        whole.flops if trains else 0.0,
        forward.saved,
        whole.saved / max(count, 1),
        between,
        trains,
        (tokens * width + pixels) * size,
    )


def image_tokens(model: Any, inputs: Mapping[str, Tensor]) -> int:
    """How many features the images give, and so tokens in the text."""
    with counting(model), torch.no_grad():
        return _features(model, inputs)[0]


def _features(model: Any, inputs: Mapping[str, Tensor]) -> tuple[int, int, Tensor]:
    """(features of the images, their width, their sum)."""
    parts = features(model, dict(inputs))
    rows = sum(part.reshape(-1, part.shape[-1]).shape[0] for part in parts)
    return rows, parts[0].shape[-1], torch.stack([part.float().sum() for part in parts]).sum()


def _between_layers(
    model: Any, tower: list[Any], inner: list[Any], inputs: Mapping[str, Tensor]
) -> tuple[float, Counted]:
    """(bytes of the inputs of all layers of the tower, what the tower costs if it trains)."""
    sizes: list[int] = []

    def note(module: Any, given: Any, named: Any) -> None:
        hidden = next(one for one in (*given, *named.values()) if isinstance(one, Tensor))
        sizes.append(hidden.numel() * hidden.element_size())

    handles = [
        layer.register_forward_pre_hook(note, with_kwargs=True) for one in tower for layer in layer_list(one)[1]
    ]
    for parameter in inner:
        parameter.requires_grad_(True)
    with counting(model) as counted:
        _features(model, inputs)
    for handle in handles:
        handle.remove()
    return float(sum(sizes)), counted


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
class _Fit:
    """What a decoder costs, from rows of two lengths."""

    forward: Flops
    backward: Flops
    saved: float

    @classmethod
    def of(cls, model: Any, decoder: Any) -> _Fit:
        runs = [_run(model, decoder, tokens) for tokens in (_ROW, 2 * _ROW)]
        return cls(
            _flops(runs[0][0].flops, runs[1][0].flops),
            _flops(runs[0][1], runs[1][1]),
            (runs[1][0].saved - runs[0][0].saved) / _ROW,
        )

    def minus(self, other: _Fit) -> _Fit:
        return self.plus(other, -1)

    def plus(self, other: _Fit, times: int) -> _Fit:
        def added(mine: Flops, theirs: Flops) -> Flops:
            return Flops(mine.token + times * theirs.token, mine.pair + times * theirs.pair)

        return _Fit(
            added(self.forward, other.forward),
            added(self.backward, other.backward),
            self.saved + times * other.saved,
        )


def _flops(short: float, long: float) -> Flops:
    """Through the costs of rows of ``_ROW`` and twice as many tokens."""
    pair = (long - 2 * short) / (2 * _ROW**2)
    return Flops(short / _ROW - pair * _ROW, pair)


def _run(model: Any, decoder: Any, tokens: int) -> tuple[Counted, float]:
    """(forward, operations of the backward) over one row. Its input needs a gradient, as that of every layer but perhaps
    the first does."""
    weight = next(decoder.parameters())
    width = model.config.get_text_config().hidden_size
    with counting(model) as forward:
        embeds = torch.empty(1, tokens, width, dtype=weight.dtype, device="meta", requires_grad=True)
        arguments = {"position_ids": torch.arange(tokens, device="meta")[None], "use_cache": False}
        hidden = decoder(inputs_embeds=embeds, **arguments)[0]
    with counting(model) as backward:
        hidden.sum().backward()
    model.zero_grad(set_to_none=True)
    return forward, float(backward.flops)

"""Causal attention inside segments of one packed row, as an attention mask that knows how to attend.

T token positions of the packed row, H heads, K channels a head.

A dense [T, T] mask would cost memory and, worse, the attention between samples that it then throws away. transformers
hands a 4-D ``attention_mask`` through the decoder's layers untouched, and gradient checkpointing keeps it for the
recomputation. So the segments travel as such a mask: a tensor subclass without storage that answers
``scaled_dot_product_attention`` itself, the way ``torch.nn.attention.bias`` does it for its causal biases.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

logger = logging.getLogger(__name__)

_AS_IT_IS = (Tensor.to, Tensor.contiguous, Tensor.detach, Tensor.clone, Tensor.bool)


class Prefixes:
    """Keys and values of the tokens before each segment's first image, kept from one pass over the layers for another.

    In a causal decoder they are the same with the image and without it, so the pass without need not compute them again.

    Args:
        places: [P] int64, where they stand in the row that is recorded, segment by segment.
        groups: query heads that share a key; transformers repeats keys for them, and one of each is kept.
    """

    def __init__(self, places: Tensor, groups: int = 1) -> None:
        self.places, self.recording = places, True
        self._groups = groups
        self._kept: list[tuple[Tensor, Tensor]] = []

    def record(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """One layer's, in the order of the layers; nothing once ``recording`` is off (checkpointing runs layers again)."""
        if self.recording:
            self._kept.append((self._of(key, query), self._of(value, query)))

    def _of(self, whole: Tensor, query: Tensor) -> Tensor:
        step = self._groups if whole.shape[1] == query.shape[1] else 1
        return whole.detach()[:, ::step].index_select(2, self.places.to(whole.device))

    def recall(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """The next layer's keys and values, [1, H, P, K]. Each once, so that they are not held longer than needed."""
        kept_key, kept_value = (kept.to(key.device, key.dtype) for kept in self._kept.pop(0))
        if key.shape[1] == query.shape[1] and self._groups > 1:
            return kept_key.repeat_interleave(self._groups, 1), kept_value.repeat_interleave(self._groups, 1)
        return kept_key, kept_value

    @property
    def layers(self) -> int:
        """How many layers' are still there."""
        return len(self._kept)


class SegmentMask(Tensor):
    """[1, 1, T, T] bool: a token sees those of its own segment up to itself.

    Args:
        lengths: tokens of each segment, in order; their sum is T.
        device: of the queries.
        recorded: takes down keys and values of the layers that attend with this mask.
        recalled: tokens that each segment sees before its own, and how many of them each segment has.

    Raises (on use): ValueError for any operation but being handed on and attended with: as plain booleans it would lie.
    """

    lengths: tuple[int, ...]
    bounds: Tensor
    key_lengths: tuple[int, ...]
    key_bounds: Tensor
    recorded: Prefixes | None
    recalled: Recalled | None

    @staticmethod
    def __new__(
        cls,
        lengths: Sequence[int],
        device: torch.device,
        recorded: Prefixes | None = None,
        recalled: Recalled | None = None,
    ) -> SegmentMask:
        total = sum(lengths)
        storage = torch.zeros(1, dtype=torch.bool, device=device).expand(1, 1, total, total)
        mask: SegmentMask = Tensor._make_subclass(cls, storage)
        mask.lengths, mask.bounds = tuple(lengths), segment_bounds(lengths, device)
        mask.key_lengths, mask.key_bounds = mask.lengths, mask.bounds
        mask.recorded, mask.recalled = recorded, recalled
        if recalled is not None:
            mask.key_lengths = tuple(before + own for before, own in zip(recalled[1], lengths, strict=True))
            mask.key_bounds = segment_bounds(mask.key_lengths, device)
        return mask

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SegmentMask(lengths={self.lengths})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        if func in _AS_IT_IS:
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        if not isinstance(found, Tensor):  # its shape, its dtype, …
            return found
        if func is Tensor.__getitem__ and found.shape == args[0].shape and _only_cuts(args[1]):
            return args[0]  # cut to the keys' length, which is all of it
        raise ValueError(
            f"a packed row's attention mask went into {getattr(func, '__name__', func)}, where it would mean something "
            "else. This attention implementation needs padding_free=False."
        )


# Prefixes, and how many of them each segment has
Recalled = tuple[Prefixes, tuple[int, ...]]


def _only_cuts(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(part, slice) or part is Ellipsis for part in parts)


def segment_bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[segments + 1] int32: 0 and where each segment ends, as variable-length kernels want them. Does not wait."""
    bounds = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return bounds.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else bounds.to(device)


@torch.compiler.disable  # a compiled layer would specialise on the segments, which change with every batch
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: SegmentMask,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of [1, H, T, K] tensors, segment by segment: by torch's variable-length kernel, else a call a segment."""
    if torch.is_autocast_enabled(query.device.type):  # which would do this for scaled_dot_product_attention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    lengths, key_lengths = attn_mask.lengths, attn_mask.key_lengths
    if attn_mask.recorded is not None:
        attn_mask.recorded.record(query, key, value)
    if attn_mask.recalled is not None:
        key, value = _after_prefixes(query, key, value, lengths, attn_mask.recalled)
    kernel = variable_length_kernel() if suits_the_kernel(query, key, value, dropout_p) else None
    if kernel is None and query.device.type == "cuda":
        _say_no_kernel(query.dtype, query.shape[-1], dropout_p)
    if kernel is not None:
        bounds, key_bounds = (ends.to(query.device) for ends in (attn_mask.bounds, attn_mask.key_bounds))
        heads = query.shape[1] // key.shape[1]
        if heads > 1:
            key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
        flat = [heads_HTK[0].transpose(0, 1).contiguous() for heads_HTK in (query, key, value)]  # [T, H, K]
        return kernel(*flat, bounds, key_bounds, max(lengths), max(key_lengths), scale).transpose(0, 1)[None]
    parts = zip(query.split(lengths, 2), key.split(key_lengths, 2), value.split(key_lengths, 2), strict=True)
    options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}
    return torch.cat([_one_segment(*part, options) for part in parts], dim=2)


def _one_segment(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    """Causal attention of the last tokens of a segment, all of its keys given."""
    before = key.shape[2] - query.shape[2]
    if not before:
        return scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    may_look = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril(before)
    return scaled_dot_product_attention(query, key, value, attn_mask=may_look, **options)


def _after_prefixes(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], recalled: Recalled
) -> tuple[Tensor, Tensor]:
    """Keys and values of each segment behind those of its prefix."""
    prefixes, before = recalled

    def joined(kept: Tensor, own: Tensor) -> Tensor:
        parts = zip(kept.split(before, 2), own.split(lengths, 2), strict=True)
        return torch.cat([part for pair in parts for part in pair], dim=2)

    kept_key, kept_value = prefixes.recall(query, key)
    return joined(kept_key, key), joined(kept_value, value)


@functools.cache
def _say_no_kernel(dtype: torch.dtype, width: int, dropout_p: float) -> None:
    logger.warning(
        "packed rows without torch's variable-length attention (%s, %d channels a head, dropout %g; it wants float16 or "
        "bfloat16, at most 256 channels, no dropout and compute capability 8.0): one call a sample and layer, which is "
        "slower. padding_free=False is the other way.",
        dtype,
        width,
        dropout_p,
    )


def suits_the_kernel(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> bool:
    """Whether FlashAttention behind torch's kernel takes these: a GPU of 8.0 or newer, half precision, no dropout."""
    width = query.shape[-1]
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.dtype == key.dtype == value.dtype
        and dropout_p == 0.0
        and width == value.shape[-1]
        and width % 8 == 0
        and width <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


@functools.cache
def variable_length_kernel() -> Callable[..., Tensor] | None:
    """``(query, key, value, bounds, key bounds, longest, longest of keys, scale) -> [T, H, K]``, or None: no such kernel.

    Causal, aligned at the ends of the segments. query [T, H, K]; key and value may have more tokens a segment. The keyword
    for causal attention changed between torch's versions, and older ones have no scale.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    accepted = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in accepted else {"is_causal": True}

    def attend(query: Tensor, key: Tensor, value: Tensor, *sizes: Any) -> Tensor:
        given, scale = dict(causal), sizes[-1]
        if scale is not None and "scale" in accepted:
            given["scale"] = scale
        elif scale is not None:
            query = query * (scale * query.shape[-1] ** 0.5)
        out: Any = varlen_attn(query, key, value, *sizes[:-1], **given)
        return out

    return attend

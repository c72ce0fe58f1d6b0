"""The features of a frozen vision tower, computed once an image and kept: what ``cache_vision_features`` does.

An image is known by its pixels as the tower gets them (a digest of the bytes), so it does not matter where they come from,
and another crop of the same file is another image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..families.dummy_images import feature_sum, features
from ..families.module_groups import module_groups
from ..families.table import family_of

LIMIT_GIB = 2.0


class VisionFeatureCache:
    """While it is :meth:`on`, the model's frozen vision tower runs once for each image that it has not seen.

        cache = VisionFeatureCache(model)
        with cache.on():
            trainer.train()

    Which of the tower's outputs the image features depend on is found with one dummy image; only those are kept, on the
    CPU, in the precision that they were computed in. What goes beyond the limit is computed each time, as without cache.

    Args:
        model: a vision-language model (the one inside PEFT's wrapper), as it trains: its tower frozen.
        limit_gib: GiB of features to keep at most, on each rank.

    Raises:
        ValueError: features cannot be kept for this model, and why.
    """

    def __init__(self, model: Any, limit_gib: float = LIMIT_GIB) -> None:
        self.tower = _tower_of(model)
        self._limit = int(limit_gib * 2**30)
        self._found: dict[bytes, list[Tensor]] = {}
        self._bytes = self.hits = self.misses = 0
        self._keep: list[int] = []
        self._how, self._spec = "", cast(Any, None)  # how the tower is called; the structure of what it gives
        self._find_what_to_keep(model)

    @property
    def full(self) -> bool:
        """Whether features were left out because of the limit, so that their images go through the tower each time."""
        return self.misses > len(self._found)

    @property
    def gib(self) -> float:
        """GiB of features that are kept."""
        return self._bytes / 2**30

    @contextmanager
    def on(self, model: Any = None) -> Iterator[VisionFeatureCache]:
        """Inside the block features come from here. ``model``: another one with the same tower in it."""
        tower = self.tower if model is None else _tower_of(model)
        run = tower.forward
        with _forward_of(tower, lambda *args, **kwargs: self._forward(run, *args, **kwargs)):
            yield self

    def _forward(self, run: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            pixels, how = _images_of(args, kwargs)
        except ValueError:
            pixels, how = None, None
        if how != self._how:  # evaluation and generation may ask for other outputs
            if self.tower.training:
                raise ValueError(
                    "cache_vision_features: in training this model calls its vision tower in another way than with its "
                    "dummy image, so what to keep is not known. Set it to false"
                )
            return run(*args, **kwargs)
        assert pixels is not None
        keys = _digests(pixels)
        fresh = self._compute(run, pixels, keys, args, kwargs)
        output: list[Any] = [None] * self._spec.num_leaves
        rows = [fresh[key] if key in fresh else self._found[key] for key in keys]
        for place, leaf in enumerate(self._keep):
            output[leaf] = torch.stack([row[place].to(pixels.device) for row in rows])
        for key, tensors in fresh.items():
            self._remember(key, tensors)
        return tree_unflatten(output, self._spec)

    def _compute(
        self, run: Any, pixels: Tensor, keys: list[bytes], args: Any, kwargs: Any
    ) -> dict[bytes, list[Tensor]]:
        """The features of the images that are not here yet, each once."""
        first = {key: index for index, key in reversed(list(enumerate(keys))) if key not in self._found}
        self.misses, self.hits = self.misses + len(first), self.hits + len(keys) - len(first)
        if not first:
            return {}
        rows = pixels[list(first.values())]
        with torch.no_grad():
            if "pixel_values" in kwargs:
                found = run(*args, **{**kwargs, "pixel_values": rows})
            else:
                found = run(rows, *args[1:], **kwargs)
        leaves, self._spec = tree_flatten(found)
        return {key: [leaves[leaf][place] for leaf in self._keep] for place, key in enumerate(first)}

    def _remember(self, key: bytes, tensors: list[Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in tensors)
        if self._bytes + size <= self._limit:
            self._bytes += size
            self._found[key] = [tensor.to("cpu", copy=True) for tensor in tensors]  # a slice would hold the whole batch

    @torch.no_grad()
    def _find_what_to_keep(self, model: Any) -> None:
        """Which leaves of the tower's output reach the features, and that features from here are the tower's own."""
        family, name = family_of(model), type(model).__name__
        refused = f"cache_vision_features with {name}"
        if family.dummy_image is None:
            raise ValueError(f"{refused}: seecal knows no dummy image for {model.config.model_type!r}. Set it to false")
        image = family.dummy_image(model)
        leaves: list[Tensor] = []
        run = self.tower.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            pixels, self._how = _images_of(args, kwargs)
            found, spec = tree_flatten(run(*args, **kwargs))
            alike = [isinstance(one, Tensor) and one.ndim > 1 and one.shape[0] == len(pixels) for one in found]
            leaves[:] = [one.detach().requires_grad_() if fits else one for one, fits in zip(found, alike, strict=True)]
            return tree_unflatten(leaves, spec)

        with _forward_of(self.tower, watched), torch.enable_grad():
            total = feature_sum(model, image)
        able = [index for index, one in enumerate(leaves) if isinstance(one, Tensor) and one.requires_grad]
        reached = (
            torch.autograd.grad(total, [leaves[i] for i in able], allow_unused=True) if total.requires_grad else []
        )
        self._keep = [index for index, gradient in zip(able, reached, strict=False) if gradient is not None]
        if not self._keep:
            raise ValueError(f"{refused}: its tower gives nothing that belongs to single images. Set it to false")
        expected = features(model, image)
        for _ in range(2):  # computed, then kept
            with self.on():
                found = features(model, image)
            if not all(_alike(one, other) for one, other in zip(found, expected, strict=True)):
                raise ValueError(f"{refused}: its features change from one run to the next. Set it to false")
        self._found.clear()
        self._bytes = self.hits = self.misses = 0


def _alike(one: Tensor, other: Tensor) -> bool:
    """Up to rounding: a kernel may add in another order for another layout in memory."""
    allowed = 64 * torch.finfo(other.dtype).eps * float(other.abs().max())
    return float((one.float() - other.float()).abs().max()) <= allowed


@contextmanager
def _forward_of(module: Any, forward: Any) -> Iterator[None]:
    """Inside the block ``module`` runs ``forward``; afterwards what it ran before, its class's or a wrapper's."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _tower_of(model: Any) -> Any:
    """The model's vision tower, frozen and without anything random in it; ValueError otherwise."""
    paths = module_groups(model).get("vision_tower", ())
    refused = f"cache_vision_features with {type(model).__name__}"
    if len(paths) != 1:
        found = f"{len(paths)} vision towers ({', '.join(paths)})" if paths else "no vision tower that seecal knows"
        raise ValueError(f"{refused}: it has {found}. Set it to false")
    tower = model.get_submodule(paths[0])
    trained = next((name for name, one in tower.named_parameters() if one.requires_grad), None)
    if trained:
        raise ValueError(
            f"{refused}: {paths[0]}.{trained} trains, so its features change. Take vision_tower out of train, or set "
            "cache_vision_features: false"
        )
    for name, module in tower.named_modules():
        random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if random or isinstance(module, nn.modules.batchnorm._BatchNorm):
            what = "dropout" if random else "a batch norm"
            raise ValueError(f"{refused}: {paths[0]}.{name} is {what}, so an image's features vary. Set it to false")
    chance = getattr(tower.config, "attention_dropout", 0.0) if hasattr(tower, "config") else 0.0
    if chance:
        raise ValueError(f"{refused}: its tower's attention_dropout is {chance}, so features vary. Set it to false")
    return tower


def _images_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, str]:
    """(pixels [B, C, H, W], the other arguments as text). ValueError for a tower that takes images in another way."""
    named = {**{str(place): one for place, one in enumerate(args)}, **kwargs}
    pixels = named.pop("pixel_values", None) if "pixel_values" in named else named.pop("0", None)
    others = sum(isinstance(one, Tensor) for one in named.values())
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or others:
        shape = list(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise ValueError(
            "cache_vision_features: this model's vision tower does not take images one by one ([images, 3, height, width] "
            f"and no other tensor), but {shape} and {others} more tensors. Set it to false"
        )
    return pixels, repr(sorted(named.items()))


def _digests(pixels: Tensor) -> list[bytes]:
    """A key for each image: its bytes, and in which precision they are computed with."""
    device = pixels.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    how = f"{pixels.dtype} {tuple(pixels.shape[1:])} {autocast}".encode()
    rows = pixels.detach().contiguous().cpu().flatten(1).view(torch.uint8).numpy()
    return [hashlib.blake2b(row.tobytes() + how, digest_size=16).digest() for row in rows]

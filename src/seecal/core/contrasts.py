"""The ways to take the image away, by name. A new one is one row in ``CONTRASTS``; torch is not needed to read them.

Two kinds. A contrast on *token positions* reads the pass with the image and runs the text decoder once more::

    function(main, has_contrast, options, all_ranks) -> ContrastOutput

with a :class:`~seecal.core.main_pass.MainPass`, [N] booleans (the label tokens for which the image can matter), the
:class:`seecal.CALOptions`, and whether other ranks may have something to run. A contrast on *pixels* keeps an image in
place and takes its content away; the collator makes it, and the vision tower and the whole row run a second time::

    function(image, strength, rng, others) -> image

with a Pillow image (RGB), the contrast's strength, a :class:`random.Random` seeded by record and epoch, and the images of
the batch's other records. The image that it returns has the size of the one that it got.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Sides of the grid that patch_mask covers cells of: CLIP ViT-L/14 at 336 px, the paper's tower, has 24 × 24 patches.
GRID = 24
_GREY = (127, 127, 127)


@dataclass(frozen=True)
class Contrast:
    """One way to take the image away.

    Attributes:
        name: what ``CALOptions(contrast=...)`` takes.
        function: see the two kinds above.
        help: what it does, in a few words.
        on_pixels: which of the two kinds it is.
        strength: the default of ``contrast_strength``; None: it has no strength.
        unit: what the strength is measured in.
        at_most: the largest strength that makes sense; None: there is none.
        takes_others: on pixels: the function needs ``others``, and one is drawn from the data where the batch has none.
        in_pixels: the strength is measured on the pixels of the full image, so it means something else on a smaller one.
    """

    name: str
    function: Callable[..., Any]
    help: str = ""
    on_pixels: bool = False
    strength: float | None = None
    unit: str = ""
    at_most: float | None = None
    in_pixels: bool = False
    takes_others: bool = False

    def checked_strength(self, strength: float | None) -> float:
        """``strength``, or the default for None; 0 where the contrast has none. ValueError where it cannot be."""
        if strength is None:
            return self.strength or 0.0
        if self.strength is None:
            with_one = ", ".join(name for name, contrast in CONTRASTS.items() if contrast.strength is not None)
            raise ValueError(
                f"contrast_strength={strength!r} with contrast={self.name!r}: only {with_one} have a strength. Leave it "
                "None."
            )
        if strength <= 0 or (self.at_most is not None and strength > self.at_most):
            most = "any size" if self.at_most is None else f"at most {self.at_most:g}"
            raise ValueError(
                f"contrast_strength={strength!r} with contrast={self.name!r}: it must be above 0, {most} ({self.unit})"
            )
        return strength


def _drop(main: Any, has_contrast: Any, options: Any, all_ranks: bool) -> Any:
    from .contrast_pass import drop_pass

    return drop_pass(main, has_contrast, options.padding_free, all_ranks)


def _mask(main: Any, has_contrast: Any, options: Any, all_ranks: bool) -> Any:
    from .contrast_pass import drop_pass, mask_pass

    if not main.batch.has_image:  # nothing to mask; on several ranks one token still runs
        return drop_pass(main, has_contrast, options.padding_free, all_ranks)
    return mask_pass(main, whole_grid=options.pool_scope == "released")


def _patch_mask(image: Any, strength: float, rng: random.Random, others: Sequence[Any]) -> Any:
    """Grey over a share ``strength`` of the cells of a 24 × 24 grid, chosen at random."""
    from PIL import Image

    covered = set(rng.sample(range(GRID * GRID), round(strength * GRID * GRID)))
    mask = Image.new("L", (GRID, GRID))
    mask.putdata([255 if cell in covered else 0 for cell in range(GRID * GRID)])
    out = image.copy()
    out.paste(_GREY, (0, 0, *image.size), mask.resize(image.size, Image.Resampling.NEAREST))
    return out


def _blur(image: Any, strength: float, rng: random.Random, others: Sequence[Any]) -> Any:
    """Gaussian blur of standard deviation ``strength``, in pixels of the image as it is."""
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(strength))


def _noise(image: Any, strength: float, rng: random.Random, others: Sequence[Any]) -> Any:
    """Gaussian noise of standard deviation ``strength`` (1 is the whole range from black to white) added to every value."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(rng.getrandbits(64))
    values = np.asarray(image, dtype=np.float32)
    changed = values + generator.normal(0, 255 * strength, values.shape)
    return Image.fromarray(changed.round().clip(0, 255).astype(np.uint8), image.mode)


def _swap(image: Any, strength: float, rng: random.Random, others: Sequence[Any]) -> Any:
    """Another record's image, resized to this one's size."""
    from PIL import Image

    if not others:
        raise ValueError(
            "contrast='swap' takes another record's image, and no other record of the batch, or of one before it, has one. "
            "Put two records with images into each batch (CALTrainer draws one from its data), or set another contrast."
        )
    return rng.choice(others).resize(image.size, Image.Resampling.BICUBIC)


CONTRASTS: dict[str, Contrast] = {
    contrast.name: contrast
    for contrast in (
        Contrast("drop", _drop, "removes its positions and keeps the position ids of the rest"),
        Contrast("mask", _mask, "hides its positions in the attention mask"),
        Contrast(
            "patch_mask",
            _patch_mask,
            "covers patches with grey",
            on_pixels=True,
            strength=0.7,
            unit="share of the patches",
            at_most=1.0,
        ),
        Contrast(
            "blur",
            _blur,
            "blurs it",
            on_pixels=True,
            strength=10.0,
            unit="σ in pixels",
            in_pixels=True,
        ),
        Contrast(
            "noise",
            _noise,
            "adds Gaussian noise",
            on_pixels=True,
            strength=0.5,
            unit="σ of values from 0 to 1",
            in_pixels=True,
        ),
        Contrast("swap", _swap, "takes another record's image", on_pixels=True, takes_others=True),
    )
}


def contrast_named(name: str) -> Contrast:
    """The row of that name. ValueError for a name that has none."""
    if name not in CONTRASTS:
        raise ValueError(f"contrast={name!r}: expected one of {', '.join(CONTRASTS)}")
    return CONTRASTS[name]

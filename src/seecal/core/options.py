"""What CAL is asked to do (CALOptions) and what its two passes measure (VisualDelta).

Shape suffixes used everywhere: B rows of the batch, L columns, T columns of the compact rows without images,
N label tokens (``labels[:, 1:] != -100``, row by row in batch order), D width of the hidden states, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

CONTRASTS = ("drop", "mask", "patch_mask", "blur", "noise", "swap")
# The contrasts that keep an image in place and take its content away, with their default strength: the share of patches,
# σ in pixels, σ of values from 0 to 1, none.
PIXEL_CONTRASTS: dict[str, float | None] = {"patch_mask": 0.7, "blur": 10.0, "noise": 0.5, "swap": None}
POOL_SCOPES = ("answer", "released")
NORMALIZERS = ("global", "micro_batch", "sample")
DELTAS = ("logit", "logprob")


@dataclass(frozen=True)
class CALOptions:
    """How Δ is measured, turned into weights and normalised. The defaults are the paper's (arXiv 2405.17871).

    Args:
        weighting: name in :data:`seecal.WEIGHTINGS`, or a function of your own, ``my_package.my_module:function``.
        alpha, beta: Δ is clamped to [alpha, beta], in logits.
        window: width in tokens of the mean over neighbouring label tokens, odd. 1 switches pooling off.
        pool_scope: ``"answer"`` pools inside a run of consecutive label tokens of one sample, as the equations say;
            ``"released"`` pools over the flattened batch, prompt and padding slots included, as the paper's code does
            (needs ``contrast="mask"``).
        delta: ``"logit"``, the difference of the label's raw logit with and without the image, or ``"logprob"``, that of
            its log-probability (costs a vocabulary projection in either pass, in chunks).
        contrast: how the image is taken away. ``"drop"`` removes its positions and keeps the position ids of the rest,
            ``"mask"`` hides them in the attention mask. ``"patch_mask"``, ``"blur"``, ``"noise"`` and ``"swap"`` keep an
            image there without its content; they run the vision tower and the whole row a second time, on the
            ``contrast_*`` inputs that the collator makes.
        contrast_strength: None: the default of the contrast. patch_mask: share of the patches (0.7); blur: σ in pixels
            (10); noise: σ of values from 0 to 1 (0.5); the others have none.
        normalize: what Σ w·CE is divided by. ``"global"``: Σ w over all ranks; ``"micro_batch"``: Σ w of this forward,
            as the paper's code does; ``"sample"``: the mean over samples with labels of each one's Σ w·CE / Σ w.
        padding_free: how either pass goes through the decoder. False: one row a sample, padded to the longest; True: the
            real slots of all samples in one row, kept apart in the attention, or ValueError where that cannot be;
            ``"auto"``: True where the model allows it and padding is saved (see :func:`seecal.core.packing.use_packed`).
        chunk_size: rows of logits held at once in the loss; None chooses about 2**25 logits.
        threshold: for weighting="vig" and no other: the least gain by the image, in nats, of a token and of its sample that
            keep their weight. Its paper's is a percentile of the data: what leaves 70 % of the samples.
        contrast_every: the image is taken away in every k-th optimizer step only, the first one included; in the
            others every weight is 1. Cheaper, and another method: CAL in one step of k, plain training in the rest. Without
            CALTrainer it counts training forwards, so with gradient accumulation micro-batches.
        fp8_contrast: the linear layers of the pass without the image multiply in float8. Cheaper on GPUs that have it, and
            inexact: docs/performance.md says by how much weights change.

    Raises:
        ValueError: a value outside its range or two that contradict each other, naming both.
    """

    weighting: str = "cal"
    alpha: float = 1.0
    beta: float = 5.0
    window: int = 3
    pool_scope: str = "answer"
    delta: str = "logit"
    contrast: str = "drop"
    contrast_strength: float | None = None
    normalize: str = "global"
    padding_free: bool | str = "auto"
    chunk_size: int | None = None
    threshold: float = 0.0
    contrast_every: int = 1
    fp8_contrast: bool = False

    def __post_init__(self) -> None:
        _check_choice("contrast", self.contrast, CONTRASTS)
        _check_choice("pool_scope", self.pool_scope, POOL_SCOPES)
        _check_choice("normalize", self.normalize, NORMALIZERS)
        _check_choice("delta", self.delta, DELTAS)
        check_window(self.alpha, self.beta, self.window)
        if self.padding_free not in ("auto", True, False):
            raise ValueError(f"padding_free={self.padding_free!r}: expected 'auto', True or False")
        if self.pool_scope == "released" and self.contrast != "mask":
            raise ValueError(
                f"pool_scope='released' with contrast={self.contrast!r}: the released pooling reads Δ at prompt and "
                "padding slots, which only contrast='mask' computes. Set contrast='mask', or pool_scope='answer'."
            )
        if self.pool_scope == "released" and self.delta != "logit":
            raise ValueError(f"pool_scope='released' with delta={self.delta!r}: the released code compares logits")
        self._check_strength()
        every = self.contrast_every
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"contrast_every={every!r}: expected a whole number of optimizer steps, 1 or more")
        if self.chunk_size is not None and (not isinstance(self.chunk_size, int) or self.chunk_size < 1):
            raise ValueError(f"chunk_size={self.chunk_size}: rows per chunk must be at least 1, or None")
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold={self.threshold}: expected a number of nats (weighting='vig' reads it)")

    def _check_strength(self) -> None:
        strength, default = self.contrast_strength, PIXEL_CONTRASTS.get(self.contrast)
        if strength is None:
            return
        if default is None:
            with_one = ", ".join(name for name, value in PIXEL_CONTRASTS.items() if value is not None)
            raise ValueError(
                f"contrast_strength={strength!r} with contrast={self.contrast!r}: only {with_one} have a strength. Leave "
                "it None."
            )
        if strength <= 0 or (self.contrast == "patch_mask" and strength > 1):
            most = "at most 1 (a share of the patches)" if self.contrast == "patch_mask" else "any size"
            raise ValueError(
                f"contrast_strength={strength!r} with contrast={self.contrast!r}: it must be above 0, {most}"
            )

    @property
    def strength(self) -> float:
        """The contrast's strength, its default where none was set; 0 where it has none."""
        if self.contrast_strength is not None:
            return self.contrast_strength
        return PIXEL_CONTRASTS.get(self.contrast) or 0.0

    @classmethod
    def of(cls, options: CALOptions | None, **overrides: Any) -> CALOptions:
        """``options`` (None: the defaults) with the overrides that are not None put in."""
        changed = {name: value for name, value in overrides.items() if value is not None}
        return dataclasses.replace(options or cls(), **changed)


def _check_choice(field: str, value: object, known: tuple[str, ...]) -> None:
    if value in known:
        return
    raise ValueError(f"{field}={value!r}: expected one of {', '.join(known)}")


def check_window(alpha: float, beta: float, window: int) -> None:
    """ValueError unless ``alpha <= beta``, both ≥ 0 (weights must not be negative), and ``window`` is odd."""
    if not 0 <= alpha <= beta:
        raise ValueError(f"alpha={alpha}, beta={beta}: Δ is clamped to [alpha, beta], so 0 <= alpha <= beta is needed")
    if isinstance(window, bool) or not isinstance(window, int) or window < 1 or window % 2 == 0:
        raise ValueError(f"window={window!r}: the pooling window must be an odd number of tokens, 1 or more")

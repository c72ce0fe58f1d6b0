"""Δ → the weight of every label token. Read this file first: it is the method, the rest is how Δ is measured.

    w_j = mean over the window of clamp(Δ_j, alpha, beta)             L = Σ w_j · CE_j / Σ w_j

A weighting is any callable ``w(visual_delta, options) -> [N]``. ``CALOptions(weighting=...)`` takes the name under which it
stands in ``WEIGHTINGS``, or where Python finds it: ``my_package.my_module:function``. What it does not read is not
computed; it says so by two attributes, ``needs_logprob`` and ``passes`` (see :class:`Weighting`; without them: both
passes, no log-probabilities).

N label tokens, B rows, L columns.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.linear_cross_entropy import reciprocal_or_zero
from .options import CALOptions, check_window
from .outputs import VisualDelta

# The two passes whose hidden states a weighting may read: with the image (the training pass) and without it.
BOTH = ("with", "without")


def token_weights(delta: Tensor, runs: Tensor, alpha: float = 1.0, beta: float = 5.0, window: int = 3) -> Tensor:
    """CAL's weights: clamped Δ, averaged over neighbours inside a run of consecutive label tokens.

    Replaces, for every run r of label tokens::

        c = delta[r].clamp(alpha, beta)
        w[r] = [c[max(0, j - window // 2) : j + window // 2 + 1].mean() for j in range(len(c))]

    Args:
        delta: [N] logit differences, any float dtype.
        runs: [N] integers, ``VisualDelta.runs``; equal neighbours belong to one run.
        alpha, beta: clamp range, in logits.
        window: odd number of tokens. At the ends of a run the mean is over what is there, not over zeros.

    Returns:
        [N] float32, between alpha and beta.

    Raises:
        ValueError: shapes that differ, an even window, or not 0 <= alpha <= beta.

    Source: equations 3 to 5 of arXiv 2405.17871.
    """
    check_window(alpha, beta, window)
    if delta.ndim != 1 or delta.shape != runs.shape:
        raise ValueError(
            f"delta {tuple(delta.shape)} and runs {tuple(runs.shape)}: both must be [N], one entry a label token"
        )
    clamped = delta.detach().float().clamp(alpha, beta)
    total, count = clamped.clone(), torch.ones_like(clamped)
    for shift in range(1, min(window // 2, len(clamped) - 1) + 1):
        same = runs[shift:] == runs[:-shift]
        # Left out and not multiplied by 0: a Δ that is not finite must not get into another run
        total[shift:] += clamped[:-shift].where(same, 0)
        total[:-shift] += clamped[shift:].where(same, 0)
        count[shift:] += same
        count[:-shift] += same
    return total / count


@dataclass(frozen=True)
class Weighting:
    """A named way from Δ to weights.

    Attributes:
        function: (VisualDelta, CALOptions) → [N] weights ≥ 0.
        source: where it was published.
        needs_logprob: it reads ``logprob_with`` or ``logprob_without``: a vocabulary projection, in chunks, for each pass
            in ``passes``.
        passes: of "with" and "without", those it reads. Where "without" is not among them the image is never taken away in
            training: Δ is 0 and ``has_contrast`` False everywhere.
    """

    function: Callable[[VisualDelta, CALOptions], Tensor]
    source: str
    needs_logprob: bool = False
    passes: tuple[str, ...] = BOTH

    def __call__(self, visual_delta: VisualDelta, options: CALOptions) -> Tensor:
        """[N] float32 weights ≥ 0 for the N label tokens."""
        return self.function(visual_delta, options)


def _cal(visual_delta: VisualDelta, options: CALOptions, sign: float = 1.0) -> Tensor:
    if options.pool_scope == "released":
        assert visual_delta.delta_grid is not None, "pool_scope='released' is given Δ on the whole grid by the forward"
        pooled_BL = _released_pool(sign * visual_delta.delta_grid, options)
        return pooled_BL[visual_delta.sample, visual_delta.position - 1]
    delta = sign * visual_delta.delta
    return token_weights(delta, visual_delta.runs, options.alpha, options.beta, options.window)


def _released_pool(grid_BL: Tensor, options: CALOptions) -> Tensor:
    """The pooling of the paper's code: over the flattened batch, where each row's end touches the next row's start."""
    flat = grid_BL.clamp(options.alpha, options.beta).reshape(1, 1, -1)
    pooled = torch.nn.functional.avg_pool1d(
        flat, options.window, stride=1, padding=options.window // 2, count_include_pad=False
    )
    return pooled.view_as(grid_BL)


def _negative(visual_delta: VisualDelta, options: CALOptions) -> Tensor:
    """CAL's mirror image: clamp(-Δ, alpha, beta), pooled. The tokens that the image speaks against weigh most.

    The paper sorts tokens into positive, invariant and negative ones and raises the weight of the negative; its thresholds
    and factor could not be verified, so this is the idea in CAL's terms, not the paper's rule.
    """
    return _cal(visual_delta, options, sign=-1.0)


def _uniform(visual_delta: VisualDelta, options: CALOptions) -> Tensor:
    return torch.ones_like(visual_delta.delta)


def _vig(visual_delta: VisualDelta, options: CALOptions) -> Tensor:
    """Keeps the tokens that gain by the image, in samples that gain by it; in logarithms, so in nats::

        gain_t = log p(t | image, text) - log p(t | text);  gain_i = mean of the sample's gains
        w_t = 1 if gain_t >= threshold and gain_i >= threshold else 0

    A sample without any contrast (text alone) keeps all its tokens; a token without one in another sample gains 0. The
    paper takes one threshold for both, measured once before training such that 70 % of its data's samples stay, and blurs
    the image instead of dropping it (contrast="blur").
    """
    gain = _logprob(visual_delta, "with") - _logprob(visual_delta, "without")
    total, count, seen = sums_of_samples(
        visual_delta.sample, gain, torch.ones_like(gain), visual_delta.has_contrast.float()
    )
    gains = (gain >= options.threshold) & (total / count >= options.threshold)
    return (gains | (seen == 0)).float()


def _prior(visual_delta: VisualDelta, options: CALOptions) -> Tensor:
    """What text alone would not have said, with a mean of 1 in each sample of k label tokens::

        w_t = (1 - p(t | text)) ** exponent;  w_t · k / Σ w of the sample

    The paper takes p from a text-only language model trained on the captions, ours is the model's own pass without the
    image (``prior_reference`` of a training reads another model, or stored scores). Where nothing is taken away (text-only
    samples, labels directly after an image) p is the training pass's.
    """
    return prior_weights(_logprob(visual_delta, "without"), visual_delta.sample, options.prior_exponent)


def prior_weights(logprob: Tensor, sample: Tensor, exponent: float = 1.0) -> Tensor:
    """PRIOR's weights: (1 - p) ** exponent, divided by their mean in each sample.

    Args:
        logprob: [N] log-probabilities of the label tokens by a model that sees no image, in nats.
        sample: [N] the sample of each; those of one sample stand together.
        exponent: α of the paper, 1 there.

    Returns:
        [N] float32 with a mean of 1 in each sample; zeros for a sample whose tokens are all certain.

    Source: arXiv 2505.08971.
    """
    weights = (-torch.expm1(logprob.float().clamp(max=0))) ** exponent
    total, count = sums_of_samples(sample, weights, torch.ones_like(weights))
    return weights * count * reciprocal_or_zero(total)


def sums_of_samples(sample: Tensor, *values: Tensor) -> list[Tensor]:
    """For each [N] of ``values`` its sum over the sample that a token belongs to, at each of the N tokens."""
    # Samples are numbered in the order of their labels: no more than N, so the device is not asked for their number
    group = torch.zeros_like(sample)
    group[1:] = (sample[1:] != sample[:-1]).cumsum(0)
    return [torch.zeros_like(one).index_add_(0, group, one)[group] for one in values]


def _dft(visual_delta: VisualDelta, options: CALOptions) -> Tensor:
    """The token's own probability under the model that trains. The paper divides by the number of label tokens:
    normalize="tokens"."""
    return _logprob(visual_delta, "with").exp()


def _logprob(visual_delta: VisualDelta, which: str) -> Tensor:
    found = getattr(visual_delta, f"logprob_{which}")
    if found is None:
        raise ValueError(
            f"this weighting reads logprob_{which}, and this VisualDelta was measured without it: call seecal.visual_delta "
            "with options=CALOptions(delta='logprob'), or with this weighting in its options"
        )
    return found


WEIGHTINGS: dict[str, Weighting] = {
    "cal": Weighting(_cal, "CAL, arXiv 2405.17871"),
    "uniform": Weighting(_uniform, "maximum likelihood: the baseline", passes=()),
    "vig": Weighting(_vig, "VIG, arXiv 2602.17186", needs_logprob=True),
    "prior": Weighting(_prior, "PRIOR, arXiv 2505.08971", needs_logprob=True, passes=("without",)),
    "negative": Weighting(_negative, "image-negative tokens, arXiv 2605.21300"),
    "dft": Weighting(_dft, "Dynamic Fine-Tuning, arXiv 2508.05629", needs_logprob=True, passes=("with",)),
    "dpa": Weighting(_cal, "Decoupled Proxy Alignment, arXiv 2509.14735", needs_logprob=True),
}


def weighting_named(name: str) -> Callable[[VisualDelta, CALOptions], Any]:
    """The entry of ``WEIGHTINGS``, or the function that a dotted name leads to.

    ``my_package.my_module:function`` (or with a dot for the colon) is imported when it is first asked for.

    Raises:
        ValueError: neither; the module cannot be imported or has no such function; what is there cannot be called.
    """
    if name in WEIGHTINGS:
        return WEIGHTINGS[name]
    if isinstance(name, str) and any(mark in name.strip(".:") for mark in ".:"):
        return _imported(name)
    raise ValueError(
        f"weighting={name!r} is not in seecal.WEIGHTINGS; it has {', '.join(WEIGHTINGS)}. A function of your own is named "
        "with its module: my_module:function"
    )


@functools.cache
def _imported(name: str) -> Callable[[VisualDelta, CALOptions], Any]:
    module, _, path = name.partition(":") if ":" in name else name.rpartition(".")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # whatever a module of the user's own does when it is run
        parts = module.split(".")
        parents = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        if isinstance(error, ModuleNotFoundError) and error.name in parents:
            said = f"there is no module {error.name!r}. Install it, or put the folder it is in into PYTHONPATH"
        else:
            said = f"importing {module!r} failed: {type(error).__name__}: {error}"
        raise ValueError(f"weighting={name!r}: {said}") from error
    own = sorted(name for name, value in vars(found).items() if getattr(value, "__module__", None) == module)
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(
                f"weighting={name!r}: {module!r} has no {path!r}; it defines {', '.join(own) or 'nothing'}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(
            f"weighting={name!r} is a {type(found).__name__}: it must be a function (visual_delta, options) -> [N] weights"
        )
    return found


def passes_read(name: str) -> tuple[str, ...]:
    """Of "with" and "without", the passes that the weighting of this name reads. ValueError for anything else there."""
    passes = getattr(weighting_named(name), "passes", BOTH)
    if isinstance(passes, str) or not set(passes) <= set(BOTH):
        raise ValueError(f"weighting={name!r} has passes={passes!r}: expected a tuple of 'with' and 'without', or ()")
    return tuple(passes)


def logprobs_read(options: CALOptions, passes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``passes`` whose log-probabilities are wanted. Δ itself is a difference of both with delta="logprob" and
    "prob"."""
    if options.delta != "logit" and "without" in passes:
        return BOTH
    return passes if getattr(weighting_named(options.weighting), "needs_logprob", False) else ()


def weights_of(visual_delta: VisualDelta, options: CALOptions) -> Tensor:
    """[N] float32, detached: what the weighting of the options gives.

    Raises:
        ValueError: it gives something else than a tensor [N] on Δ's device; or, looked at the first time it gives any
            weights (it waits for the device), a weight below 0 or not finite.
    """
    weighting, delta = weighting_named(options.weighting), visual_delta.delta
    weights = weighting(visual_delta, options)
    if not isinstance(weights, Tensor):
        raise ValueError(
            f"weighting={options.weighting!r} gave a {type(weights).__name__}: expected a tensor with a weight for each "
            f"of the {len(delta)} label tokens"
        )
    if weights.shape != delta.shape or weights.device != delta.device:
        raise ValueError(
            f"weighting={options.weighting!r} gave weights of shape {tuple(weights.shape)} on {weights.device}: expected "
            f"{tuple(delta.shape)}, one for each label token, on {delta.device}"
        )
    weights = weights.detach().float()
    if len(delta) and _looked_at.get(options.weighting) is not weighting:
        wrong = weights[~((weights >= 0) & weights.isfinite())]
        if len(wrong):
            raise ValueError(
                f"weighting={options.weighting!r} gave the weight {float(wrong[0]):g} ({len(wrong)} of {len(delta)} such "
                "weights in its first batch): weights must be finite and not negative"
            )
        _looked_at[options.weighting] = weighting
    return weights


# The weightings, by name, whose values have been looked at.
_looked_at: dict[str, Any] = {}

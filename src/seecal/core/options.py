"""What CAL is asked to do. The help of every option stands here once: CALConfig, ``--help`` and the docs take it from here.

Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from dataclasses import dataclass, field
from typing import Any

from .contrasts import CONTRASTS, contrast_named

POOL_SCOPES = ("answer", "released")
NORMALIZERS = ("global", "micro_batch", "sample", "tokens", "matched")
# Of these, those that divide by a number of the whole optimizer step. The others make each micro-batch's loss a mean of its
# own, and a trainer averages those.
OVER_THE_STEP = ("global", "tokens")
DELTAS = ("logit", "logprob", "prob")
# What a weighting puts in the place of the defaults, where these could not be meant: no difference of probabilities is
# above 1, so a lower bound of 1 would make every weight the same.
OWN_DEFAULTS: dict[str, dict[str, Any]] = {"dpa": {"delta": "prob", "alpha": 0.05, "beta": 0.5}}
# Several options by one name, as a recipe's `preset` has it. The paper's code departs from its equations in these three: it
# keeps the image's positions in the second pass, pools over the flattened batch and divides by the micro-batch's weights.
PRESETS = {"released": {"normalize": "micro_batch", "pool_scope": "released", "contrast": "mask"}}


def option(default: Any, help: str) -> Any:
    """A field of a dataclass of options, with its help text."""
    return field(default=default, metadata={"help": help})


def documented(options: type) -> type:
    """The class with an Args section in its docstring, made of its fields' help texts."""
    lines = ["Args:"]
    for field_ in dataclasses.fields(options):
        entry = f"{field_.name}: {field_.metadata['help']} Default: {field_.default!r}."
        lines.append(textwrap.indent(textwrap.fill(entry, 112, subsequent_indent="    "), "    "))
    head, raises, rest = (options.__doc__ or "").partition("    Raises:")
    args = textwrap.indent("\n".join(lines), "    ")
    options.__doc__ = f"{head.rstrip()}\n\n{args}\n\n{raises}{rest}"
    return options


def _contrasts_help() -> str:
    on_tokens = [f"{name!r} {row.help}" for name, row in CONTRASTS.items() if not row.on_pixels]
    on_pixels = [f"{name!r} {row.help}" for name, row in CONTRASTS.items() if row.on_pixels]
    return (
        f"How the image is taken away: {', '.join(on_tokens)}; {', '.join(on_pixels)} (these keep an image there without "
        "its content and run the vision tower and the whole row a second time, on inputs that the collator makes)."
    )


def _strengths_help() -> str:
    with_one = [f"{name}: {row.unit} ({row.strength:g})" for name, row in CONTRASTS.items() if row.strength is not None]
    return f"How strongly a contrast on pixels changes the image; unset: the contrast's own. {'; '.join(with_one)}."


@documented
@dataclass(frozen=True)
class CALOptions:
    """How Δ is measured, turned into weights and normalised. The defaults are the paper's (arXiv 2405.17871).

    Raises:
        ValueError: a value outside its range or two that contradict each other, naming both.
    """

    weighting: str = option(
        "cal",
        "How Δ becomes a weight per label token: a name in seecal.WEIGHTINGS (cal, uniform, vig, prior, negative, dft, "
        "dpa), or a function of your own, my_package.my_module:function.",
    )
    alpha: float = option(
        1.0,
        "Lower bound for Δ, in its unit (logits): the weight of tokens that the image does not help. weighting='dpa' reads "
        "the default as its own 0.05.",
    )
    beta: float = option(
        5.0, "Upper bound for Δ, in its unit (logits). weighting='dpa' reads the default as its own 0.5."
    )
    window: int = option(3, "Label tokens in the mean over neighbouring weights, odd. 1 switches pooling off.")
    pool_scope: str = option(
        "answer",
        "'answer' pools inside runs of consecutive label tokens of one sample, as the equations say; 'released' pools over "
        "the flattened batch, prompt and padding included, as the paper's code does (needs contrast='mask').",
    )
    delta: str = option(
        "logit",
        "What Δ is a difference of, with and without the image: 'logit', the label's raw logit; 'logprob', its "
        "log-probability in nats; 'prob', its probability, as weighting='dpa' has it (the latter two cost a vocabulary "
        "projection in either pass, in chunks).",
    )
    contrast: str = option("drop", _contrasts_help())
    contrast_strength: float | None = option(None, _strengths_help())
    normalize: str = option(
        "global",
        "What Σ w·CE is divided by: 'global', Σ w over all ranks and, with CALTrainer, all micro-batches of the optimizer "
        "step; 'micro_batch', Σ w of each forward, as the paper's code does; 'sample', the mean over samples with labels "
        "of each one's Σ w·CE / Σ w; 'tokens', the number of label tokens of the step, as DFT and PRIOR have it; "
        "'matched', what makes the loss of each forward the plain mean of CE, so that weights change its gradient alone "
        "(PRIOR's code).",
    )
    padding_free: bool | str = option(
        "auto",
        "How both passes go through the decoder: True packs the real tokens of all samples into one row, kept apart in the "
        "attention (an error where the model does not allow it); False keeps one row a sample, padded to the longest; "
        "'auto' packs where the model allows it and padding is saved.",
    )
    chunk_size: int | None = option(None, "Rows of logits held at once in the loss; unset: about 2**25 logits.")
    threshold: float = option(
        0.0,
        "For weighting='vig' and no other: the least gain by the image, in nats, of a token and of its sample that keep "
        "their weight. Its paper's is a percentile of the data: what leaves 0.7 of the samples.",
    )
    prior_exponent: float = option(
        1.0,
        "For weighting='prior' and no other: the power to which 1 - p is raised, p being the token's probability without "
        "the image. 0: every weight is 1.",
    )
    contrast_every: int = option(
        1,
        "Take the image away in every k-th optimizer step only, the first one included; in the others every weight is 1. "
        "Cheaper, and another method: CAL in one step of k, plain training in the rest. Without CALTrainer it counts "
        "training forwards.",
    )
    fp8_contrast: bool = option(
        False,
        "Multiply in float8 in the pass without the image: cheaper on GPUs of compute capability 8.9 and newer, and "
        "inexact (docs/performance.md says by how much weights change).",
    )

    def __post_init__(self) -> None:
        _put_own_defaults(self)
        contrast_named(self.contrast).checked_strength(self.contrast_strength)
        check_choice("pool_scope", self.pool_scope, POOL_SCOPES)
        check_choice("normalize", self.normalize, NORMALIZERS)
        check_choice("delta", self.delta, DELTAS)
        check_window(self.alpha, self.beta, self.window)
        if self.padding_free not in ("auto", True, False):
            raise ValueError(f"padding_free={self.padding_free!r}: expected 'auto', True or False")
        if self.pool_scope == "released" and self.contrast != "mask":
            raise ValueError(
                f"pool_scope='released' with contrast={self.contrast!r}: the released pooling reads Δ at prompt and "
                "padding positions, which only contrast='mask' computes. Set contrast='mask', or pool_scope='answer'."
            )
        if self.pool_scope == "released" and self.delta == "logprob":
            raise ValueError(
                "pool_scope='released' with delta='logprob': CAL's code compares logits and DPA's probabilities. Set "
                "delta='logit' or delta='prob', or pool_scope='answer'."
            )
        if self.delta == "prob" and self.weighting in ("cal", "negative") and self.alpha >= 1:
            raise ValueError(
                f"delta='prob' with alpha={self.alpha}: no difference of probabilities is above 1, so every weight would "
                "be alpha. Set alpha and beta below 1 (DPA's: 0.05 and 0.5), or weighting='dpa'."
            )
        every = self.contrast_every
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"contrast_every={every!r}: expected a whole number of optimizer steps, 1 or more")
        if self.chunk_size is not None and (not isinstance(self.chunk_size, int) or self.chunk_size < 1):
            raise ValueError(f"chunk_size={self.chunk_size}: rows per chunk must be at least 1, or None")
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold={self.threshold}: expected a number of nats (weighting='vig' reads it)")
        if not 0 <= self.prior_exponent < math.inf:
            raise ValueError(
                f"prior_exponent={self.prior_exponent}: expected a power, 0 or more (weighting='prior' reads it)"
            )

    @property
    def strength(self) -> float:
        """The contrast's strength, its default where none was set; 0 where it has none."""
        return contrast_named(self.contrast).checked_strength(self.contrast_strength)


def _put_own_defaults(options: CALOptions) -> None:
    """Puts a weighting's own values where the options were left at CAL's defaults."""
    for name, value in OWN_DEFAULTS.get(options.weighting, {}).items():
        if getattr(options, name) == CALOptions.__dataclass_fields__[name].default:
            object.__setattr__(options, name, value)
    if options.weighting == "dpa" and options.delta != "prob":
        raise ValueError(
            f"weighting='dpa' with delta={options.delta!r}: DPA compares probabilities. Leave delta out, or set "
            "weighting='cal'."
        )


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    """ValueError unless ``value`` is one of ``known``, naming the option."""
    if value not in known:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}")


def check_window(alpha: float, beta: float, window: int) -> None:
    """ValueError unless ``alpha <= beta``, both ≥ 0 (weights must not be negative), and ``window`` is odd."""
    if not 0 <= alpha <= beta:
        raise ValueError(f"alpha={alpha}, beta={beta}: Δ is clamped to [alpha, beta], so 0 <= alpha <= beta is needed")
    if isinstance(window, bool) or not isinstance(window, int) or window < 1 or window % 2 == 0:
        raise ValueError(f"window={window!r}: the pooling window must be an odd number of tokens, 1 or more")

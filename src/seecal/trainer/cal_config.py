"""CALConfig: TRL's SFTConfig plus the fields of :class:`seecal.CALOptions`, for :class:`seecal.CALTrainer`."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from transformers.training_args import OptimizerNames
from trl import SFTConfig

from ..core.options import CALOptions
from ..data.options import DataOptions, check_decoding

_OPTION_NAMES = tuple(one.name for one in dataclasses.fields(CALOptions))
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "auto": "auto"}


def _option(name: str, help_text: str) -> Any:
    """A config field with the default that CALOptions gives the option of that name."""
    default = next(one.default for one in dataclasses.fields(CALOptions) if one.name == name)
    return field(default=default, metadata={"help": help_text})


@dataclass
class CALConfig(SFTConfig):
    """Arguments of :class:`seecal.CALTrainer`: everything of :class:`trl.SFTConfig`, and the options of CAL.

    The fields of :class:`seecal.CALOptions` have the same names, meanings and defaults here.
    ``on_long`` says what happens to records longer than ``max_length``, ``on_bad`` what happens to those without a label,
    ``image_decoding`` how JPEG files are decoded. Two inherited fields differ:

    - ``padding_free`` is CAL's (how both passes go through the decoder: "auto", True or False), not TRL's, which vision
      data does not support.
    - ``logging_nan_inf_filter`` is False: a non-finite loss stops the training, so there is nothing to filter, and the
      filter costs a wait for the device in every micro-batch.

    Raises:
        ValueError: an option outside its range, or something that CALTrainer does not support, naming both.
    """

    weighting: str = _option(
        "weighting",
        "How Δ becomes a weight per label token: cal, uniform, vig, prior, negative, dft, another name in "
        "seecal.WEIGHTINGS, or a function of your own, my_module:function.",
    )
    alpha: float = _option("alpha", "Lower bound for Δ, in logits: the weight of tokens that the image does not help.")
    beta: float = _option("beta", "Upper bound for Δ, in logits.")
    window: int = _option("window", "Label tokens in the mean over neighbouring weights, odd. 1 switches pooling off.")
    pool_scope: str = _option(
        "pool_scope",
        "'answer' pools inside runs of consecutive label tokens of one sample; 'released' pools over the flattened batch, "
        "as the paper's code does (needs contrast='mask').",
    )
    delta: str = _option(
        "delta", "What Δ is a difference of: 'logit', the label's raw logit with and without the image."
    )
    contrast: str = _option(
        "contrast",
        "How the image is taken away: 'drop' removes its positions, 'mask' hides them in the attention mask; 'patch_mask', "
        "'blur', 'noise' and 'swap' put an image without its content there (the vision tower runs twice).",
    )
    contrast_strength: float | None = _option(
        "contrast_strength",
        "patch_mask: share of patches (0.7); blur: σ in pixels (10); noise: σ of values in 0..1 (0.5).",
    )
    normalize: str = _option(
        "normalize",
        "What the weighted loss is divided by: 'global', the sum of weights of the whole optimizer step over micro-batches "
        "and ranks; 'micro_batch', that of each micro-batch, as the paper's code does; 'sample', the mean over samples.",
    )
    padding_free: str = field(  # type: ignore[assignment]  # "auto", True or False; argparse knows one type a field
        default="auto",
        metadata={
            "help": "How both passes go through the decoder: 'true' packs all samples into one row without padding, "
            "'false' keeps one row a sample, 'auto' chooses. (Not TRL's, which vision data does not support.)"
        },
    )
    chunk_size: int | None = _option(
        "chunk_size", "Rows of logits held at once in the loss; unset: about 2**25 logits."
    )
    contrast_every: int = _option(
        "contrast_every",
        "Take the image away in every k-th optimizer step only; in the others every weight is 1 (plain training).",
    )
    fp8_contrast: bool = _option(
        "fp8_contrast",
        "Multiply in float8 in the pass without the image: cheaper on GPUs of compute capability 8.9 and newer, inexact.",
    )
    threshold: float = _option(
        "threshold", "For weighting='vig' only: the least gain by the image, in nats, of a token and of its sample."
    )
    on_long: str = field(
        default="truncate",
        metadata={
            "help": "What happens to records of more than max_length tokens, image tokens included: 'truncate' cuts their "
            "text after the last image and stops where an image would have to be cut; 'drop' leaves them out; 'error' "
            "stops. They are counted, and the first is named."
        },
    )
    on_bad: str = field(
        default="error",
        metadata={
            "help": "What happens to records without a label, because they have no answer or because on_long='truncate' "
            "cut all of it: 'error' stops and names the record; 'skip' leaves it out. They are counted, and the first is "
            "named."
        },
    )
    image_decoding: str = field(
        default="exact",
        metadata={
            "help": "'exact' decodes images in full; 'reduced' decodes JPEG files at 1/2, 1/4 or 1/8 of their size where "
            "that is no smaller than what the processor resizes them to: faster, with slightly other pixels."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Keep False: CALTrainer stops at a non-finite loss instead of leaving it out of the log."},
    )

    def __post_init__(self) -> None:
        if isinstance(self.padding_free, str):  # the command line gives text
            self.padding_free = _TRUTH.get(self.padding_free.lower(), self.padding_free)  # type: ignore[assignment]
        self.cal_options()
        DataOptions(self.on_long, self.on_bad, self.image_decoding)
        check_decoding(self.image_decoding, self.contrast)
        super().__post_init__()
        self.refuse_unsupported()

    def cal_options(self) -> CALOptions:
        """The options of CAL in this config. ValueError for a value outside its range."""
        return CALOptions(**{name: getattr(self, name) for name in _OPTION_NAMES})

    def refuse_unsupported(self) -> None:
        """ValueError for every inherited argument that CALTrainer would otherwise ignore or get wrong."""
        if self.packing or self.eval_packing:
            name = "packing" if self.packing else "eval_packing"
            raise ValueError(
                f"{name}=True: TRL packs token sequences before training, which images cannot go through. Set "
                f"{name}=False; padding_free packs CAL's own second pass."
            )
        if self.loss_type != "nll":
            raise ValueError(
                f"loss_type={self.loss_type!r}: the loss of CALTrainer is CAL's. Leave loss_type='nll' (TRL's name for "
                "what evaluation computes) and choose the token weights with weighting=..."
            )
        if self.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel=True: Liger replaces the model's forward, and with it the two passes of CAL. Set it to "
                "False; the loss is already computed in chunks at the label positions only."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor}: CAL weights plain cross-entropies. Set it to 0."
            )
        if self.torch_compile:
            raise ValueError("torch_compile=True: the forward of CAL is not compiled yet. Set it to False.")
        if self.logging_nan_inf_filter:
            raise ValueError(
                "logging_nan_inf_filter=True would hide a non-finite loss that CALTrainer stops at. Set it to False."
            )
        if self.gradient_accumulation_steps > 1 and self.normalize == "global":
            _refuse_early_updates(self)


def _refuse_early_updates(config: CALConfig) -> None:
    """normalize="global" corrects the gradients after a step's last backward: nothing may update the weights before."""
    where = f"gradient_accumulation_steps={config.gradient_accumulation_steps} and normalize='global'"
    remedy = "Set gradient_accumulation_steps=1 (with a larger batch) or normalize='micro_batch'."
    if config.deepspeed_plugin is not None or config.deepspeed:
        raise ValueError(
            f"DeepSpeed with {where}: DeepSpeed updates the weights inside backward, before the sum of weights over the "
            f"micro-batches is known. {remedy}"
        )
    optimizer = OptimizerNames(config.optim).value
    if optimizer in ("lomo", "adalomo") or optimizer.endswith("layerwise"):
        raise ValueError(
            f"optim={optimizer!r} with {where}: this optimizer updates the weights inside backward, before the sum of "
            f"weights over the micro-batches is known. {remedy}"
        )
    if config.world_size > 1 and not config.average_tokens_across_devices:
        raise ValueError(
            f"average_tokens_across_devices=False with {where}: 'global' counts tokens over all ranks. Leave it True, or "
            "set normalize='micro_batch'."
        )

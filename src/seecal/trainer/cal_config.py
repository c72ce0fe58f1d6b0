"""CALConfig: TRL's SFTConfig plus the fields of :class:`seecal.CALOptions`, for :class:`seecal.CALTrainer`."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers.training_args import OptimizerNames
from trl import SFTConfig

from ..core.options import OVER_THE_STEP, CALOptions, check_choice
from ..data.options import DataOptions, check_decoding, mapping_of
from .options import AnswerOptions, HangOptions, LoggingOptions
from .sampling import BY_MODALITY, STRATEGIES

_OPTION_NAMES = tuple(field.name for field in dataclasses.fields(CALOptions))
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "auto": "auto"}


def _same(options: type, name: str, **command_line: Any) -> Any:
    """A config field with the default and the help of the field of that name in ``options``; ``command_line``: what
    argparse is told beside them."""
    (source,) = (field for field in dataclasses.fields(options) if field.name == name)
    return dataclasses.field(default=source.default, metadata={**source.metadata, **command_line})


@dataclass
class CALConfig(SFTConfig):
    """Arguments of :class:`seecal.CALTrainer`: everything of :class:`trl.SFTConfig`, and the options of CAL.

    The fields of :class:`seecal.CALOptions` have the same names, meanings and defaults here.
    ``on_long`` says what happens to records longer than ``max_length``, ``on_bad`` what happens to those without a label,
    ``image_decoding`` how JPEG files are decoded, ``train_on`` which turns are learnt, ``processor_kwargs`` how the
    processor is set, ``weights`` where those that were measured before lie, ``logging_tokens_steps`` how often the tokens
    of one evaluation record are logged, ``eval_metric`` how answers are measured at an evaluation, ``hang_timeout`` when a
    rank without progress ends. Three inherited fields differ:

    - ``padding_free`` is CAL's (how both passes go through the decoder: "auto", True or False), not TRL's, which vision
      data does not support.
    - ``train_sampling_strategy`` may be "group_by_modality_length" too, the order of the paper's code.
    - ``logging_nan_inf_filter`` is False: a non-finite loss stops the training, so there is nothing to filter, and the
      filter costs a wait for the device in every micro-batch.

    Raises:
        ValueError: an option outside its range, or something that CALTrainer does not support, naming both.
    """

    weighting: str = _same(CALOptions, "weighting")
    alpha: float = _same(CALOptions, "alpha")
    beta: float = _same(CALOptions, "beta")
    window: int = _same(CALOptions, "window")
    pool_scope: str = _same(CALOptions, "pool_scope")
    delta: str = _same(CALOptions, "delta")
    contrast: str = _same(CALOptions, "contrast")
    contrast_strength: float | None = _same(CALOptions, "contrast_strength")
    normalize: str = _same(CALOptions, "normalize")
    # argparse knows one type a field; a bare --padding_free is SFTConfig's way to say True
    padding_free: str = _same(CALOptions, "padding_free", nargs="?", const="true")  # type: ignore[assignment]
    chunk_size: int | None = _same(CALOptions, "chunk_size")
    threshold: float = _same(CALOptions, "threshold")
    prior_exponent: float = _same(CALOptions, "prior_exponent")
    contrast_every: int = _same(CALOptions, "contrast_every")
    fp8_contrast: bool = _same(CALOptions, "fp8_contrast")
    on_long: str = _same(DataOptions, "on_long")
    on_bad: str = _same(DataOptions, "on_bad")
    max_bad_records: float | None = _same(DataOptions, "max_bad_records")
    image_decoding: str = _same(DataOptions, "image_decoding")
    weights: str | None = _same(DataOptions, "weights")
    vig_percentile: float | None = _same(DataOptions, "vig_percentile")
    prior_reference: str | None = _same(DataOptions, "prior_reference")
    train_on: str = _same(DataOptions, "train_on")
    processor_kwargs: dict[str, Any] | str | None = _same(DataOptions, "processor_kwargs")  # noqa: RUF009  # None
    logging_tokens_steps: int | None = _same(LoggingOptions, "logging_tokens_steps")
    eval_metric: str | None = _same(AnswerOptions, "eval_metric")
    eval_metric_records: int = _same(AnswerOptions, "eval_metric_records")
    eval_max_new_tokens: int = _same(AnswerOptions, "eval_max_new_tokens")
    hang_timeout: float = _same(HangOptions, "hang_timeout")
    train_sampling_strategy: str = dataclasses.field(
        default="random",
        metadata={
            "help": f"The order of the records: {', '.join(STRATEGIES)}. {BY_MODALITY}: each optimizer step has records "
            "with images only, or without only, as in the paper's code.",
            "choices": list(STRATEGIES),
        },
    )
    logging_nan_inf_filter: bool = dataclasses.field(
        default=False,
        metadata={"help": "Keep False: CALTrainer stops at a non-finite loss instead of leaving it out of the log."},
    )

    def __post_init__(self) -> None:
        HangOptions(self.hang_timeout)
        if isinstance(self.padding_free, str):  # the command line gives text
            self.padding_free = _TRUTH.get(self.padding_free.lower(), self.padding_free)  # type: ignore[assignment]
        self.cal_options()
        if isinstance(self.processor_kwargs, str):  # the command line gives text
            self.processor_kwargs = mapping_of("processor_kwargs", self.processor_kwargs)
        check_choice("train_sampling_strategy", self.train_sampling_strategy, STRATEGIES)
        DataOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(DataOptions)})
        check_decoding(self.image_decoding, self.contrast)
        self._check_measured_before()
        super().__post_init__()
        self.refuse_unsupported()

    def cal_options(self) -> CALOptions:
        """The options of CAL in this config. ValueError for a value outside its range."""
        return CALOptions(**{name: getattr(self, name) for name in _OPTION_NAMES})

    @property
    def measures_before(self) -> bool:
        """Whether weights are measured once before training."""
        return self.vig_percentile is not None or self.prior_reference is not None

    @property
    def brings_weights(self) -> bool:
        """Whether records bring their weights into training, so that nothing is contrasted there."""
        return self.weights is not None or self.measures_before

    def _check_measured_before(self) -> None:
        for name, weighting in (("vig_percentile", "vig"), ("prior_reference", "prior")):
            value = getattr(self, name)
            if value is not None and self.weighting != weighting:
                raise ValueError(
                    f"{name}={value!r} with weighting={self.weighting!r}: it is what weighting={weighting!r} measures once "
                    f"before training. Set weighting={weighting!r}, or leave {name} out."
                )
            if value is not None and self.weights is not None:
                raise ValueError(
                    f"{name}={value!r} and weights={self.weights!r}: the weights are there already. Set one."
                )
        if self.vig_percentile is not None and self.contrast not in ("drop", "blur"):
            raise ValueError(
                f"vig_percentile={self.vig_percentile!r} with contrast={self.contrast!r}: VIG blurs the image. Leave "
                "contrast out, or measure with seecal score --logprobs and seecal filter --tokens --by gain --top."
            )

    def refuse_unsupported(self) -> None:
        """ValueError for a number of steps that is none, and every inherited argument that CALTrainer would get wrong."""
        LoggingOptions(self.logging_tokens_steps)
        AnswerOptions(self.eval_metric, self.eval_metric_records, self.eval_max_new_tokens)
        if self.packing or self.eval_packing:
            name = "packing" if self.packing else "eval_packing"
            raise ValueError(
                f"{name}=True: TRL joins token sequences of the whole data set before training. Images cannot go through "
                f"that, and in joined text no sample tells what its answer follows. Set {name}=False: padding_free packs a "
                "batch into one row without padding, text-only batches too."
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
        if self.logging_nan_inf_filter:
            raise ValueError(
                "logging_nan_inf_filter=True would hide a non-finite loss that CALTrainer stops at. Set it to False."
            )
        if self.gradient_accumulation_steps > 1 and self.normalize == "global":
            _refuse_early_updates(self)
        if self.gradient_accumulation_steps > 1 and self.normalize in OVER_THE_STEP:
            _refuse_counts_of_one_rank(self)


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


def _refuse_counts_of_one_rank(config: CALConfig) -> None:
    if config.world_size > 1 and not config.average_tokens_across_devices:
        raise ValueError(
            f"average_tokens_across_devices=False with normalize={config.normalize!r} and "
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}: tokens are counted over all ranks. Leave "
            "it True, or set normalize='micro_batch'."
        )

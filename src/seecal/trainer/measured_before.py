"""Weights that are measured once, before training, by the model that training starts from or by a reference beside it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn

from ..core.options import CALOptions
from ..data.collators.processors import configure
from ..families.table import head_of, is_partitioned, unwrap
from ..scoring.before_training import are_scores, prior_records, vig_records
from ..scoring.join import with_weights
from ..scoring.reference import score_reference
from ..scoring.run import score
from .cal_config import CALConfig

logger = logging.getLogger(__name__)

FOLDER = "scores"  # in output_dir


def with_measured(data: Any, args: CALConfig, model: Any, processor: Any) -> Any:
    """The training data with the weights that ``args`` asks to be measured, or to be read, before training; else as it is.

    ``vig_percentile`` and ``prior_reference`` measure into OUTPUT_DIR/scores, which goes on where it was stopped.

    Args:
        model: that is going to train, as it is at its start, or its name; it is left as it was.
        processor: of the model.

    Raises:
        ValueError: data that streams or that brings weights, a model in shards, or what the pass itself cannot use.
    """
    if args.weights is not None:
        return with_weights(data, args.weights)
    if args.prior_reference is not None and are_scores(args.prior_reference):
        return with_weights(data, args.prior_reference, prior_exponent=args.prior_exponent)
    if not args.measures_before:
        return data
    asked = "vig_percentile" if args.vig_percentile is not None else "prior_reference"
    _check(data, model, processor, asked)
    configure(processor, args.processor_kwargs)  # type: ignore[arg-type]
    folder, state = Path(str(args.output_dir)) / FOLDER, PartialState()
    shared = {"processor": processor, "train_on": args.train_on, "on_bad": args.on_bad, "console": _lines()}
    shared |= {"batch_size": args.per_device_eval_batch_size}
    if asked == "prior_reference":
        _said_of(folder, lambda: score_reference(str(args.prior_reference), data, folder, device=args.device, **shared))
        state.wait_for_everyone()
        return prior_records(data, folder, args.prior_exponent)
    options = CALOptions(weighting="uniform", contrast="blur", contrast_strength=args.contrast_strength)
    with _on_device(model, args):
        _said_of(folder, lambda: score(model, data, folder, options=options, logprobs=True, **shared))
    state.wait_for_everyone()
    kept, report = vig_records(data, folder, float(args.vig_percentile or 0))
    state.wait_for_everyone()
    if state.is_main_process:
        logger.warning(
            "vig_percentile=%g: the threshold is %s nats; %d of %d records stay (%d without an image), and %d of their %d "
            "label tokens get weight 0 (%s)",
            args.vig_percentile,
            "none, no record has an image" if report.threshold is None else f"{report.threshold:.6g}",
            report.kept,
            len(data),
            report.text_only,
            report.tokens_removed,
            report.tokens,
            report.log,
        )
    return kept


def _check(data: Any, model: Any, processor: Any, asked: str) -> None:
    if not isinstance(data, Dataset):
        raise ValueError(
            f"{asked} with a {type(data).__name__}: it is measured record by record before training, and joined by place. "
            "Pass a datasets.Dataset (seecal.load_records makes one), and set streaming: false."
        )
    if "weights" in data.column_names:
        raise ValueError(f"{asked}, but the records bring a column 'weights' of their own. Drop one.")
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(f"{asked} reads the records as the model does. Pass its processor as processing_class.")
    if isinstance(model, nn.Module) and is_partitioned(head_of(unwrap(model))):
        raise ValueError(
            f"{asked} with DeepSpeed ZeRO-3, under which no rank has the whole model before training. Measure with seecal "
            "score --logprobs and seecal filter --tokens --by gain first, or train with ZeRO-2."
        )


def _said_of(folder: Path, run: Callable[[], Any]) -> None:
    try:
        run()
    except ValueError as error:
        if str(error).startswith(f"{folder}:"):
            raise ValueError(f"{error} This folder is made before training: delete it, and it is made again.") from None
        raise


@contextlib.contextmanager
def _on_device(model: Any, args: CALConfig) -> Iterator[None]:
    """Inside the block the model is where it will train, in the precision it will train in."""
    autocast = torch.autocast(
        args.device.type, torch.bfloat16 if args.bf16 else torch.float16, enabled=bool(args.bf16 or args.fp16)
    )
    placed = (
        not isinstance(model, nn.Module) or hasattr(model, "hf_device_map") or hasattr(model, "quantization_method")
    )
    before = None if placed else next(model.parameters()).device
    if before is not None:
        model.to(args.device)
    try:
        with autocast:
            yield
    finally:
        if before is not None:
            model.to(before)


def _lines() -> Any:
    """A console for plain lines: the bars of a run may be drawn already."""
    from rich.console import Console

    return Console(force_terminal=False)

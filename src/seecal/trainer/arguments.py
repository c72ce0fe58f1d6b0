"""What CALTrainer is constructed with: other configs made into ours, and what it cannot honour refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from .cal_config import CALConfig

# Fields of other configs whose value would mean something else here, or stop the training.
_OURS = {
    "padding_free",  # False is TRL's default and no wish; True is taken over
    "logging_nan_inf_filter",  # True by default there; here there is nothing to filter
}
# Reporting integrations that get_available_reporting_integrations never lists; they check for themselves.
_UNLISTED = {"flyte"}


def cal_config(args: Any, model: Any) -> CALConfig:
    """``args`` as a CALConfig: itself, one made of a TrainingArguments or SFTConfig, or the default for None.

    Fields that CALConfig has are copied, as SFTTrainer copies them; all of CAL's own are its defaults.

    Raises:
        ValueError: something else, or fields of a subclass that were set and that CALConfig does not have.
    """
    if args is None:
        name = model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", "") or "")
        return CALConfig(f"{name.rstrip('/').split('/')[-1]}-CAL" if name else "CAL")
    if isinstance(args, CALConfig):
        return args
    if isinstance(args, TrainingArguments):
        return _converted(args)
    raise ValueError(
        f"args is a {type(args).__name__}: CALTrainer needs a seecal.CALConfig, or a trl.SFTConfig or "
        "transformers.TrainingArguments to make one of"
    )


def _converted(args: TrainingArguments) -> CALConfig:
    known = {field.name for field in dataclasses.fields(CALConfig) if field.init}
    copied, lost = {}, []
    for field in dataclasses.fields(args):
        if not field.init or field.name in _OURS:
            continue
        if field.name in known:
            copied[field.name] = getattr(args, field.name)
        elif getattr(args, field.name) != field.default and field.default is not dataclasses.MISSING:
            lost.append(f"{field.name}={getattr(args, field.name)!r}")
    if lost:
        raise ValueError(
            f"args is a {type(args).__name__} with {', '.join(lost)}, which CALTrainer does not know. Pass a "
            "seecal.CALConfig."
        )
    if getattr(args, "padding_free", False):
        copied["padding_free"] = True
    return CALConfig(**copied)


def check_reporting(args: CALConfig) -> None:
    """ValueError for a logger in ``report_to`` whose package is not installed."""
    checked = set(INTEGRATION_TO_CALLBACK) - _UNLISTED  # others are refused by Trainer, as names that it does not know
    missing = sorted(checked & set(args.report_to or ()) - set(get_available_reporting_integrations()))
    if missing:
        raise ValueError(
            f"report_to={missing[0]!r}: its package is not installed here, or is switched off. Install it (pip install "
            f"{missing[0].replace('_', '-')}), or set report_to='none'."
        )


def refuse_other_losses(compute_loss_func: Any, parallelism: Any) -> None:
    """ValueError for a loss of the caller's own, and for rows that are split over ranks."""
    if compute_loss_func is not None:
        raise ValueError("compute_loss_func: the loss of CALTrainer is CAL's. Leave it out, or use trl.SFTTrainer.")
    sizes = {name: getattr(parallelism, f"{name}_size", 1) for name in ("tp", "cp", "sp")} if parallelism else {}
    if any(size > 1 for size in sizes.values()):
        raise ValueError(f"parallelism_config with {sizes}: CAL needs whole rows on each rank. Set tp, cp and sp to 1.")


def refuse_without_whole_weights(trainer: Any, asked: str, doing: str, instead: str) -> None:
    """ValueError where weights are spread in a way that the model cannot be used in between its steps.

    Args:
        asked: what was set, as "eval_metric=vqa".
        doing: what would be done between the steps.
        instead: what to set where the engine is meant.
    """
    if trainer.is_deepspeed_enabled or (trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2):
        name = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP of version 1"
        raise ValueError(
            f"{asked} with {name}: {doing} between its steps is not tested there. {instead}, or train with DDP or FSDP2 "
            "(fsdp_version: 2)."
        )


def other_loss(trainer: Any, method: str) -> ValueError:
    """The error for a subclass whose ``method`` leaves out CALTrainer's, so that nothing of CAL would be learnt."""
    owner = next(kind for kind in type(trainer).__mro__ if method in vars(kind))
    return ValueError(
        f"{owner.__name__}.{method} did not call CALTrainer's, so its loss has nothing of CAL. Call super().{method}(...) "
        "in it and change what that returns, write a weighting (seecal.WEIGHTINGS), or use trl.SFTTrainer."
    )

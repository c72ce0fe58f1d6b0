"""What a stage's settings, files and launch cannot be, told before anything trains: a later stage would find it days later.

``check_numbers`` needs the recipe alone, ``check_settings`` the stage's CALConfig too, ``check_files`` and ``check_launch``
the machine that trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_steps")
# What is joined to records by their place, which a stream has not
_BY_PLACE = ("weights", "vig_percentile", "prior_reference")


def check_numbers(where: str, stage: Mapping[str, Any], train: Sequence[str]) -> None:
    """ValueError for numbers with which a stage would train nothing. ``where``: what to call it."""
    steps = stage.get("max_steps", -1)
    for name in _COUNTS:
        given = stage.get(name, 1)
        if given < 1 and not (name == "max_steps" and given == -1):  # transformers would take 0 steps for "no limit"
            raise ValueError(f"{where}: {name}={given}: expected 1 or more{', or -1' * (name == 'max_steps')}")
    epochs, rates = stage.get("num_train_epochs", 1), stage.get("learning_rates") or {}
    if epochs <= 0 and steps < 1:
        raise ValueError(
            f"{where}: num_train_epochs={epochs}: the stage would take no step. Set more than 0, or max_steps"
        )
    own = [name for name in train if name not in rates]
    for name, rate, groups in (
        ("learning_rate", stage.get("learning_rate", 1), own),
        *((f"learning_rates: {group}", rate, [group]) for group, rate in rates.items()),
    ):
        if rate <= 0 and groups:
            raise ValueError(
                f"{where}: {name}={rate}: {', '.join(groups)} would not move. Set more than 0, or leave what is to stay "
                "frozen out of train"
            )


def check_settings(stage: Any, config: Any) -> None:
    """ValueError for settings of a :class:`Stage` that contradict each other, beyond what its CALConfig refuses."""
    from ..core.contrasts import contrast_named

    where = f"stage {stage.number}: "
    if missing := sorted(set(stage.learning_rates) - set(stage.train)):
        raise ValueError(
            f"{where}learning_rates: {', '.join(missing)} does not train here; what trains is {', '.join(stage.train)}. "
            "Add it to train, or set the rate in the stage that trains it"
        )
    if stage.cache_vision_features and contrast_named(config.contrast).on_pixels:
        raise ValueError(
            f"{where}cache_vision_features with contrast: {config.contrast}: that changes the pixels, so "
            "the tower has to run on them. Set cache_vision_features: false, or contrast: drop"
        )
    if not stage.eval_data and (asked := _evaluates(config)):
        raise ValueError(
            f"{where}{asked} without eval_data: there is nothing to evaluate. Set eval_data, or take it out"
        )
    if config.save_strategy.value == "best" and config.metric_for_best_model is None:
        raise ValueError(f"{where}save_strategy: best: by which figure? Set metric_for_best_model, such as eval_loss")
    if stage.streaming and (by_place := [name for name in _BY_PLACE if getattr(config, name) is not None]):
        raise ValueError(
            f"{where}{by_place[0]} with streaming: true: weights are joined to records by their place, which a stream has "
            "not. Set streaming: false"
        )


def _evaluates(config: Any) -> str | None:
    """The first setting that needs evaluation data."""
    if config.eval_strategy.value != "no":
        return f"eval_strategy: {config.eval_strategy.value}"
    names = ("logging_tokens_steps", "eval_metric")
    return next((f"{name}: {value}" for name in names if (value := getattr(config, name))), None)


def check_files(stage: Any) -> None:
    """FileNotFoundError for a file or folder of a :class:`Stage` that is missing, data aside; ValueError for no scores."""
    for name in ("deepspeed", "fsdp_config", "accelerator_config"):
        value = stage.settings.get(name)
        if isinstance(value, str) and not value.lstrip().startswith("{") and not Path(value).is_file():
            raise FileNotFoundError(f"{name}: {value}: no such file")
    scores = stage.settings.get("weights")
    if scores is not None:
        from ..scoring.manifest import read_manifest

        if not Path(scores).exists():
            raise FileNotFoundError(f"weights: {scores}: no such folder. seecal score writes one")
        read_manifest(scores)
    reference = stage.settings.get("prior_reference")
    if reference is not None and not Path(reference).exists() and not _may_be_a_hub_id(reference):
        raise FileNotFoundError(
            f"prior_reference: {reference}: no such folder. Give a language model's, its hub id, or a folder of scores"
        )


def _may_be_a_hub_id(name: str) -> bool:
    return not name.startswith((".", "/", "~")) and (
        "/" not in name or (name.count("/") == 1 and not Path(name).parent.is_dir())
    )


def check_launch(stage: Any, config: Any) -> None:
    """ValueError or ImportError for what this machine or this launch has not: loggers, optimizers, a whole vision tower."""
    from transformers.integrations import get_reporting_integration_callbacks

    from ..trainer.arguments import check_reporting

    where = f"stage {stage.number}: "
    get_reporting_integration_callbacks(config.report_to)  # its error lists those that there are
    check_reporting(config)
    if stage.cache_vision_features and (engine := _shards_weights(config)):
        # A rank that has all its images would not come to gather the tower's shards, and the others would wait for it
        raise ValueError(
            f"{where}cache_vision_features: the ranks share the tower's weights ({engine}), so all of them have to "
            "run it in every step. Set cache_vision_features: false, or launch with DDP"
        )
    if not _shards_weights(config):  # DeepSpeed may bring its own
        _check_optimizer(where, config)


def _shards_weights(config: Any) -> str | None:
    """FSDP or DeepSpeed, where the config or ``accelerate launch`` asks for it."""
    from accelerate.utils import parse_flag_from_env

    asked = {"DeepSpeed": bool(config.deepspeed), "FSDP": bool(config.fsdp)}
    asked = {name: yes or parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}") for name, yes in asked.items()}
    return next((name for name, yes in asked.items() if yes), None)


def _check_optimizer(where: str, config: Any) -> None:
    """That the optimizer and the schedule can be made, by making those of one number."""
    import torch
    from transformers import Trainer, get_scheduler

    name = getattr(config.optim, "value", config.optim)
    try:
        if not config.optim_target_modules:  # else it looks for its modules in the model
            Trainer.get_optimizer_cls_and_kwargs(config, torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(f"{where}optim: {name}: {error}. Set another, or optim_args") from None
    name = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
    try:
        one = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        given = {"num_warmup_steps": 0, "num_training_steps": 1}
        get_scheduler(name, one, **given, scheduler_specific_kwargs=config.lr_scheduler_kwargs or {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}lr_scheduler_type: {name}: {error}. Set lr_scheduler_kwargs") from None

"""One training by CALTrainer, with the settings that all of the experiments share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from seecal import CALConfig, CALTrainer

from .records import Record, plain


def trained(
    model: Any,
    processor: Any,
    records: Sequence[Record],
    folder: str | Path,
    *,
    steps: int,
    rate: float,
    batch: int,
    seed: int,
    callbacks: Sequence[Any] = (),
    **settings: Any,
) -> CALTrainer:
    """Trains the parameters of ``model`` that take gradients, and returns the trainer, done.

    AdamW, a cosine after 20 steps of warm-up at most, no checkpoints. The order of the records is ``seed``'s.

    Args:
        folder: for what the trainer writes.
        rate: learning rate.
        batch: records of a step.
        callbacks: of transformers' trainer.
        settings: further fields of :class:`seecal.CALConfig`; they win. Without any it is the paper's CAL.
    """
    shared: dict[str, Any] = {
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(20, steps // 5),
        "optim": "adamw_torch",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "seed": seed,
        "data_seed": seed,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": max(1, steps // 10),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
        "disable_tqdm": True,
    }
    args = CALConfig(str(folder), **{**shared, **settings})
    trainer = CALTrainer(
        model, args, train_dataset=plain(records), processing_class=processor, callbacks=list(callbacks)
    )
    trainer.train()
    return trainer

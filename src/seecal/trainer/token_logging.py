"""One fixed evaluation record's tokens, coloured by Δ, logged while training: ``logging_tokens_steps``.

The training is the same with and without it, to the bit: no random number, mode or count of it changes.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

from ..constants import CONTRAST_PREFIX, IGNORE_INDEX, LENGTH_COUNTS, RECORD_IDS
from ..core.coloured import ColouredToken
from ..core.contrasts import contrast_named
from ..core.enable import visual_delta
from ..core.options import CALOptions
from ..core.outputs import VisualDelta
from ..data.collators.checked import CheckedCollator
from ..data.collators.conversation import record_name
from ..data.collators.vision import VisionCollator
from ..models.generate import in_eval_mode
from .arguments import refuse_without_whole_weights
from .random_numbers import same_random_numbers
from .samples import is_indexed
from .token_backends import BACKENDS, LoggedTokens, backends_of

logger = logging.getLogger(__name__)

_LOOKED_AT = 64  # records of the evaluation data, for the first one that can be shown
_CUT_SHORT = "\ufffd"  # what a tokenizer writes for the first bytes of a character


@dataclass(frozen=True)
class FixedRecord:
    """The record that every log shows: its name, and its batch of one row, on the host."""

    name: str
    batch: dict[str, Any]


class TokenLogger(TrainerCallback):
    """Logs before the first step and at the end of every ``every``-th. A resumed training goes on with its step numbers.

    Args:
        trainer: a CALTrainer.
        record: what to show.
        backends: what logs, as of :func:`seecal.trainer.token_backends.backends_of`.
        every: optimizer steps from one log to the next.
    """

    def __init__(
        self, trainer: Any, record: FixedRecord, backends: Mapping[str, Callable[[LoggedTokens], None]], every: int
    ) -> None:
        self._trainer, self._record, self._backends, self._every = trainer, record, backends, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._log(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            self._log(state)

    def _log(self, state: Any) -> None:
        trainer, first = self._trainer, state.is_world_process_zero
        # The parts of sharded parameters come from all ranks; else the bare model runs on the first alone, and nobody waits
        if not (first or trainer.is_fsdp_enabled):
            return
        start = time.perf_counter()
        with trainer.accelerator.autocast():
            delta = measured(trainer.model, trainer._prepare_inputs(dict(self._record.batch)), trainer.cal_options)
        if first:
            answers = coloured_answers(delta, trainer._tokenizer)
            for log in self._backends.values():
                log(LoggedTokens(state.global_step, self._record.name, answers))
        trainer._paused += time.perf_counter() - start  # no part of tokens_per_second


def token_logger(trainer: Any) -> TokenLogger | None:
    """The callback that a CALTrainer's config asks for; None where it asks for none, or where nothing can show tokens,
    which is said.

    Raises:
        ValueError: no evaluation data, or no record in it that has tokens to show; DeepSpeed, or FSDP of version 1.
    """
    every = trainer.args.logging_tokens_steps
    if not every:
        return None
    asked = f"logging_tokens_steps={every}"
    refuse_without_whole_weights(trainer, asked, "measuring Δ", "Set logging_tokens_steps=0")
    if trainer.eval_dataset is None:
        raise ValueError(
            f"{asked} without eval_dataset: the tokens shown are those of its first record. Set eval_dataset (eval_data in "
            "a recipe), or logging_tokens_steps=0."
        )
    backends = backends_of(trainer.callback_handler.callbacks)
    others = sorted(set(trainer.args.report_to or ()) - set(backends)) or ([] if backends else ["none"])
    if others:
        logger.warning(
            "%s: report_to=%s cannot show tokens, so none are logged there. Those that can: %s.",
            asked, ", ".join(map(repr, others)), ", ".join(BACKENDS),
        )  # fmt: skip
    if not backends:
        return None
    with same_random_numbers(_gpus(trainer.model)):
        return TokenLogger(trainer, fixed_record(trainer), backends, every)


# ---- The record ----


def fixed_record(trainer: Any) -> FixedRecord:
    """The first record of a CALTrainer's evaluation data (of the first set, where it has several) that has a label after an
    image, and its batch.

    Raises:
        ValueError: none of the first records has, and what was wrong with the first of them.
    """
    dataset, name = trainer.eval_dataset, "eval_dataset"
    if isinstance(dataset, Mapping):
        key, dataset = next(iter(dataset.items()))
        name = f"eval_dataset[{key!r}]"
    options: CALOptions = trainer.cal_options
    kept = trainer._remove_unused_columns(dataset, "evaluation") if isinstance(dataset, Dataset) else dataset
    collator = _own(trainer._collator_of(dataset, name), options)
    wrong, found, usable = "", [], 2 if options.contrast == "swap" else 1
    for index, record in enumerate(_first_records(kept)):
        try:
            batch = _collated(_plain(collator), [record])
        except (ValueError, OSError) as error:
            wrong = wrong or " ".join(str(error).split())
            continue
        if _shows_something(batch, trainer._image_ids):
            found.append((record, record_name(record, index)))
        if len(found) == usable:
            break
    asked = f"logging_tokens_steps={trainer.args.logging_tokens_steps}"
    if not found:
        raise ValueError(
            f"{asked}: none of the first {_LOOKED_AT} records of {name} has an answer after an image"
            f"{f' ({wrong})' if wrong else ''}. Put one that has among them, or set logging_tokens_steps=0."
        )
    (record, called), others = found[0], [record for record, _ in found[1:]]
    if others:
        collator([*others, record])  # keeps the image of the other one to swap with
    batch = _collated(collator, [record])
    if contrast_named(options.contrast).on_pixels and not any(one.startswith(CONTRAST_PREFIX) for one in batch):
        raise ValueError(
            f"{asked} with contrast={options.contrast!r}: the data collator makes no {CONTRAST_PREFIX}pixel_values of "
            f"{called}. Set contrast='drop', or logging_tokens_steps=0."
        )
    return FixedRecord(called, batch)


def _first_records(dataset: Any) -> Iterator[Any]:
    if not is_indexed(dataset):
        yield from itertools.islice(iter(dataset), _LOOKED_AT)
        return
    for index in range(min(len(dataset), _LOOKED_AT)):
        yield dataset[index]


def _own(collator: Any, options: CALOptions) -> Any:
    """The collator again, with counts of its own and the images without their content that the contrast needs."""
    if isinstance(collator, CheckedCollator):
        return dataclasses.replace(collator)
    if not isinstance(collator, VisionCollator):
        return collator
    contrast = options.contrast if contrast_named(options.contrast).on_pixels else None
    return dataclasses.replace(collator, contrast=contrast, strength=options.strength, epoch=0)


def _plain(collator: Any) -> Any:
    return dataclasses.replace(collator, contrast=None) if isinstance(collator, VisionCollator) else collator


def _collated(collator: Any, records: list[Any]) -> dict[str, Any]:
    batch = collator(records)
    return {name: value for name, value in batch.items() if name not in (LENGTH_COUNTS, RECORD_IDS)}


def _shows_something(batch: Mapping[str, Any], image_ids: set[int]) -> bool:
    """Whether a label stands after an image."""
    ids_L, labels_L = batch["input_ids"][0], batch["labels"][0]
    images = torch.isin(ids_L, torch.tensor(sorted(image_ids))).nonzero()
    labels = (labels_L != IGNORE_INDEX).nonzero()
    return bool(len(images) and len(labels) and images[0] < labels[-1])


# ---- The measurement ----


def measured(model: Any, batch: dict[str, Any], options: CALOptions) -> VisualDelta:
    """Δ of a batch in eval mode, on the host; every module's mode and all random numbers are as before afterwards."""
    with same_random_numbers(_gpus(model)), in_eval_mode(model):
        delta = visual_delta(model, batch, contrast=options.contrast, options=options)
    fields = {field.name: getattr(delta, field.name) for field in dataclasses.fields(delta)}
    return dataclasses.replace(delta, **{name: value.cpu() for name, value in fields.items() if value is not None})


def _gpus(model: nn.Module) -> set[torch.device]:
    return {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}


# ---- Its tokens ----


def coloured_answers(delta: VisualDelta, tokenizer: Any) -> list[list[ColouredToken]]:
    """The label tokens of each answer of a batch, with their texts as they read in it."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    answers: list[list[ColouredToken]] = []
    runs, ids = delta.runs.tolist(), delta.labels.tolist()
    measured_N = list(zip(ids, delta.delta.tolist(), delta.has_contrast.tolist(), strict=True))
    for _, group in itertools.groupby(zip(runs, measured_N, strict=True), key=lambda one: one[0]):
        rows = [row for _, row in group]
        texts = token_texts(tokenizer, [index for index, _, _ in rows])
        answers.append([ColouredToken(text, *row[1:]) for text, row in zip(texts, rows, strict=True)])
    return answers


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text of those before it, so that blanks between words are there whatever the tokenizer. A
    character of several tokens belongs to the last of them, the others are ""."""
    texts, said = [], ""
    for count in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)
        if whole.endswith(_CUT_SHORT) and count < len(ids):
            texts.append("")
            continue
        texts.append(whole[len(said) :])
        said = whole
    return texts

"""What the model answers while it trains: ``eval_metric`` has it write answers to some records at each evaluation.

The training is the same with and without it, to the bit: no random number, mode or count of it changes. All ranks answer
their share, in step: where they hold a model together, each of them has to run the same modules as often as the others.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import gather_object
from torch.distributed.fsdp import FSDPModule
from transformers import ProcessorMixin

from ..data.collators.conversation import record_name
from ..evaluation.examples import answer_of
from ..evaluation.metrics.table import metric_named
from ..models.generate import generated, prompt_of
from .arguments import refuse_without_whole_weights
from .random_numbers import same_random_numbers
from .samples import is_indexed

logger = logging.getLogger(__name__)


@dataclass
class _Slice:
    """The records of an evaluation set that are asked, their names and true answers, and whether each has an image."""

    dataset: Any  # kept, so that its id stays its own
    records: list[Mapping[str, Any]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    references: list[list[Any]] = field(default_factory=list)
    pictured: list[bool] = field(default_factory=list)


class AnswerMetric:
    """Asks the model, and measures. A trainer keeps one.

    Args:
        trainer: a CALTrainer whose config names an ``eval_metric``.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._args = trainer, trainer.args
        self._metric = metric_named(trainer.args.eval_metric)
        self._slices: dict[int, _Slice] = {}

    def choose(self, dataset: Any, name: str) -> _Slice:
        """The records of an evaluation set that are asked: those of the first ``eval_metric_records`` that can be.

        Raises:
            ValueError, FileNotFoundError: one that cannot, unless bad ones are skipped; none that can.
        """
        if id(dataset) in self._slices:
            return self._slices[id(dataset)]
        chosen = _Slice(dataset)
        for index, record in enumerate(_first(dataset, self._args.eval_metric_records)):
            called = record_name(record, index)
            try:
                prompt = self._prompt(record, called)
                references = self._metric.of_turn(answer_of(record, called))
            except (ValueError, OSError) as error:
                if self._args.on_bad != "skip":
                    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
                    raise kind(f"eval_metric: {name}: {error}") from error
                logger.warning("eval_metric: %s: left out: %s", name, error)
                continue
            chosen.records.append(record)
            chosen.names.append(called)
            chosen.references.append(references)
            chosen.pictured.append(bool(prompt.images))
        if not chosen.records:
            raise ValueError(
                f"eval_metric={self._args.eval_metric}: none of the first {self._args.eval_metric_records} records of "
                f"{name} can be asked. Put one that can among them, or set eval_metric: null."
            )
        self._slices[id(dataset)] = chosen
        return chosen

    def measured(self, dataset: Any, prefix: str) -> dict[str, float]:
        """``{"eval_exact": figure}`` of the answers of all ranks to the records of one evaluation set."""
        trainer = self._trainer
        devices = {one.device for one in trainer.model.parameters() if one.device.type == "cuda"}
        with same_random_numbers(devices), trainer.accelerator.autocast(), _whole_root(trainer.model):
            chosen = self.choose(dataset, prefix)
            said = gather_object(list(self._answers(chosen)))
        texts = dict(said)
        predictions = [texts[place] for place in range(len(chosen.records))]
        scores = self._metric.scores(predictions, chosen.references, [{"id": name} for name in chosen.names])
        return {f"{prefix}_{self._args.eval_metric}": self._metric.figure(scores)}

    def _answers(self, chosen: _Slice) -> Iterator[tuple[int, str]]:
        """(place, answer) of this rank's share."""
        trainer = self._trainer
        rank, ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes
        # A rank that has written its answers runs the model on until the others have theirs, where they need its part
        options = {"max_new_tokens": self._args.eval_max_new_tokens}
        options |= {"generation": {"synced_gpus": trainer.is_fsdp_enabled and ranks > 1}}
        for places, counts in shares(chosen.pictured, rank, ranks, self._args.per_device_eval_batch_size):
            prompts = [self._prompt(chosen.records[place], chosen.names[place]) for place in places]
            answers = generated(trainer.model, trainer.processing_class, prompts, **options)
            trainer.watchdog.beat(f"answers after step {trainer.state.global_step}")
            if counts:
                yield from zip(places, answers, strict=True)

    def _prompt(self, record: Mapping[str, Any], name: str) -> Any:
        template = getattr(self._trainer.data_collator, "chat_template", None)
        return prompt_of(self._trainer.processing_class, record, name, template)


def shares(pictured: list[bool], rank: int, ranks: int, batch_size: int) -> Iterator[tuple[list[int], bool]]:
    """The batches of one rank as places in the list, and whether its answers count.

    All ranks have as many batches, and in each of them all have records with images or all have none. A rank for which none
    is left answers another's once more, for nothing.

    Args:
        pictured: of each record, whether it has an image.
    """
    for kind in (True, False):
        places = [place for place, has_image in enumerate(pictured) if has_image is kind]
        for start in range(0, len(places), ranks * batch_size):
            together = places[start : start + ranks * batch_size]
            mine = together[rank::ranks]
            yield mine or together[:1], bool(mine)


def answer_metric(trainer: Any) -> AnswerMetric | None:
    """What a CALTrainer's config asks for; None where it asks for none.

    Raises:
        ValueError: no evaluation data, or none of its first records can be asked; no processor of a vision-language model;
            DeepSpeed, or FSDP of version 1.
    """
    if trainer.args.eval_metric is None:
        return None
    asked = f"eval_metric={trainer.args.eval_metric}"
    refuse_without_whole_weights(trainer, asked, "answering", "Take eval_metric out")
    if trainer.eval_dataset is None:
        raise ValueError(f"{asked} without eval_dataset: set it (eval_data in a recipe), or take eval_metric out.")
    if not isinstance(trainer.processing_class, ProcessorMixin):
        raise ValueError(
            f"{asked}: processing_class is a {type(trainer.processing_class).__name__}, which cannot make a question with "
            "an image. Pass the model's processor."
        )
    metric, sets = AnswerMetric(trainer), trainer.eval_dataset
    with same_random_numbers():
        for name, dataset in sets.items() if isinstance(sets, Mapping) else [("eval_dataset", sets)]:
            metric.choose(dataset, name)
    return metric


@contextlib.contextmanager
def _whole_root(model: Any) -> Iterator[None]:
    """Parameters of an FSDP2 model that belong to none of its layers are whole inside the block: ``generate`` runs the
    vision tower before the model's forward, which is what gathers them."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def _first(dataset: Any, count: int) -> Iterator[Mapping[str, Any]]:
    if not is_indexed(dataset):
        yield from itertools.islice(iter(dataset), count)
        return
    for index in range(min(len(dataset), count)):
        yield dataset[index]

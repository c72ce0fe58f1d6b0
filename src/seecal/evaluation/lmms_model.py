"""A vision-language model as lmms-eval wants one: the class behind ``--model seecal`` of its command line."""

from __future__ import annotations

import os
from collections.abc import MutableMapping, Sequence
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms

from ..models.generate import answers
from ..models.loading import load_vlm
from ..verbosity import Progress
from .module_state import damaged_images_refused
from .task_requests import Settings, answered


class SeecalModel(lmms):
    """Any model that seecal loads, for tasks of type ``generate_until``.

    Args:
        pretrained: a model's folder or hub id, or a model already on its device.
        processor: of a model that is given; with a folder its own is loaded.
        batch_size: questions in one call of ``generate``; lmms-eval's command line gives it as a text.
        device: None: this rank's GPU if there is one, else the CPU. Of a model that is given: where it is.
        dtype: to load it in; "auto": as it was saved.
        max_batch_size: of lmms-eval's search for a batch size, which is not done here.
        kept: answers that need not be asked for again, by question; new ones are put in.
        load_options: more arguments of ``from_pretrained``.

    Raises:
        ValueError: as :func:`seecal.models.loading.load_vlm`, or a batch size that is no number.
    """

    is_simple = False  # requests bring messages, not texts

    def __init__(
        self,
        pretrained: Any,
        *,
        processor: Any = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: Any = "auto",
        max_batch_size: Any = None,
        kept: MutableMapping[str, str] | None = None,
        **load_options: Any,
    ) -> None:
        super().__init__()
        self.batch_size, self.kept = _batch_size(batch_size), kept
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # else lmms-eval makes one, which on CPUs knows of no other rank
            self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        if isinstance(pretrained, str | os.PathLike):
            self.model, self.processor = load_vlm(os.fspath(pretrained), dtype=dtype, **load_options)
            self.model.to(device or _own_device())
        elif processor is None:
            raise ValueError("processor=None: a model that is given needs its processor: pass processor=...")
        else:
            self.model, self.processor = pretrained, processor

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval gathers its counts there."""
        return self.model.device

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.config.name_or_path)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer for each request, in their order. ValueError naming task and document where one fails."""
        task_names = sorted({request.args[4] for request in requests})
        options: Any = {"batch_size": self.batch_size, "kept": self.kept}
        with (
            damaged_images_refused(),
            Progress(shown=self.rank == 0) as bars,
            bars.task(", ".join(task_names), len(requests), unit="answer") as bar,
        ):
            return answered(requests, self.task_dict, self._ask, tell=bar.advance, **options)

    def _ask(self, records: list[dict[str, Any]], settings: Settings) -> list[str]:
        return answers(
            self.model,
            self.processor,
            records,
            max_new_tokens=settings.max_new_tokens,
            batch_size=len(records),
            generation=settings.generation,
        )

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        _refuse(requests, "log-likelihoods (loglikelihood, multiple_choice)")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        _refuse(requests, "several rounds (generate_until_multi_round)")

    def clean(self) -> None:
        """Nothing: lmms-eval's own would take the model away, and with it the next run with this object."""


def _refuse(requests: Sequence[Any], what: str) -> NoReturn:
    task = getattr(requests[0], "task_name", None) if requests else None
    raise NotImplementedError(
        f"task {task}: it asks for {what}, and seecal's models only generate. Take its variant of type generate_until."
    )


def _batch_size(given: int | str) -> int:
    try:
        number = int(given)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise ValueError(f"batch_size={given!r}: expected a whole number of questions, 1 or more")
    return number


def _own_device() -> str:
    """This process's GPU, by the number that torchrun and accelerate give it."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"

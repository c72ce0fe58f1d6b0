"""lmms-eval's list of tasks, with errors that say which task and why, and modules that no run leaves changed."""

from __future__ import annotations

import contextlib
import difflib
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
from lmms_eval.api.task import Task
from lmms_eval.tasks import TaskManager
from tenacity import RetryError

from .module_state import ModuleState, functions_in

_ANSWERED = ("generate_until", "generate_until_agentic")  # the kinds of tasks that only ask for answers


class Tasks(TaskManager):
    """The tasks of lmms-eval and of a folder.

    Args:
        seed: for tasks that guess where an answer holds no choice. lmms-eval sets it before it generates, and what draws
            numbers until the scoring begins is not the same in every run.
        options: of ``TaskManager``.
    """

    def __init__(self, seed: int = 0, **options: Any) -> None:
        super().__init__("WARNING", model_name="seecal", **options)
        self._seed = seed
        self._modules: list[ModuleState] = []

    def known(self, names: Sequence[str]) -> list[str]:
        """The names, patterns resolved. ValueError for one that no task has."""
        found: dict[str, None] = {}
        for name in names:
            matching = self.match_tasks([name])
            if not matching:
                near = difflib.get_close_matches(name, self.all_tasks, n=1)
                hint = f"Did you mean {near[0]}?" if near else "lmms-eval tasks list names all; your own: include_path."
                raise ValueError(f"task {name}: lmms-eval has none of this name. {hint}")
            found |= dict.fromkeys(matching)
        return list(found)

    def load_task_or_group(self, names: Any, task_type: Any = "simple") -> dict[Any, Any]:
        """As lmms-eval's, with data loaded; one after the other, so that an error can name its task."""
        loaded: dict[Any, Any] = {}
        for name in [names] if isinstance(names, str) else names:
            try:
                loaded |= super().load_task_or_group([name], task_type)
            except Exception as error:
                raise ValueError(f"task {name}: {_why(error)}") from error
        for task in _tasks_in(loaded):
            name, kind = task.config.task, task.get_config("output_type")
            if kind not in _ANSWERED:
                raise ValueError(
                    f"task {name}: it is of type {kind}, and seecal's models only generate. Take its variant of type "
                    "generate_until, if it has one."
                )
            functions = [*functions_in(vars(task.config))]
            if shutil.which("java") is None and any(_scores_captions(function) for function in functions):
                raise ValueError(
                    f"task {name}: its captions are scored by a program in Java, which is not installed. Install it "
                    "(Debian: apt-get install default-jre-headless)."
                )
            self._modules.append(ModuleState(functions))
            task.process_results = _scoring(task.process_results, name, self._seed)
        return loaded

    @contextlib.contextmanager
    def kept_modules(self) -> Iterator[None]:
        """What the tasks' modules hold is put back at the end."""
        try:
            yield
        finally:
            while self._modules:
                self._modules.pop().restore()


def _scores_captions(function: Callable[..., Any]) -> bool:
    """Whether its module takes something from pycocoevalcap, whose tokenizer is a Java program."""
    found = getattr(function, "__globals__", {}).values()
    return any(str(getattr(value, "__module__", "")).startswith("pycocoevalcap") for value in found)


def _scoring(score: Callable[..., Any], name: str, seed: int) -> Callable[..., Any]:
    """A task's scoring of its answers, seeded before the first; an error names the task and the answer."""
    begun: list[bool] = []

    def named(doc: Any, results: Any, **options: Any) -> Any:
        if not begun:
            begun.append(True)
            random.seed(seed)
            numpy.random.seed(seed)
        try:
            return score(doc, results, **options)
        except Exception as error:
            raise ValueError(f"task {name}: it failed to score {results!r}: {_why(error)}") from error

    return named


def _tasks_in(loaded: Any) -> Iterator[Task]:
    """Every task in what lmms-eval loads: dicts, whose values are tasks, further dicts, or (group, task)."""
    if isinstance(loaded, dict):
        loaded = list(loaded.values())
    if isinstance(loaded, list | tuple):
        for one in loaded:
            yield from _tasks_in(one)
    elif isinstance(loaded, Task):
        yield loaded


def _why(error: BaseException) -> str:
    """The error itself, out of the retries around it, and what to do about it."""
    while isinstance(error, RetryError) and error.last_attempt.exception() is not None:
        error = error.last_attempt.exception()  # type: ignore[assignment]
    text = " ".join(str(error).split())
    if isinstance(error, ConnectionError) or "offline" in text.lower() or "couldn't reach" in text.lower():
        offline = any(os.environ.get(name) == "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
        remedy = "Unset HF_HUB_OFFLINE" if offline else "Connect to the network"
        text += f" Its data is on the hub. {remedy} once so that it is fetched, or redirect it (docs/evaluation.md)."
    return f"{type(error).__name__}: {text}"

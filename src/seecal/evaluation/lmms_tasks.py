"""lmms-eval's list of tasks, with errors that say which task and why, and modules that no run leaves changed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from lmms_eval.api.task import Task
from lmms_eval.tasks import TaskManager
from tenacity import RetryError

from .module_state import ModuleState, functions_in


class Tasks(TaskManager):
    """The tasks of lmms-eval and of a folder."""

    def __init__(self, **options: Any) -> None:
        super().__init__("WARNING", model_name="seecal", **options)
        self._modules: list[ModuleState] = []

    def known(self, names: Sequence[str]) -> list[str]:
        """The names, patterns resolved. ValueError for one that no task has."""
        found: dict[str, None] = {}
        for name in names:
            matching = self.match_tasks([name])
            if not matching:
                import difflib

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
            self._modules.append(ModuleState(functions_in(vars(task.config))))
        return loaded

    @contextlib.contextmanager
    def kept_modules(self) -> Iterator[None]:
        """What the tasks' modules hold is put back at the end; an error of a task's own scoring is told in one line."""
        try:
            yield
        except RetryError as error:
            raise ValueError(f"a task failed to score an answer: {_why(error)}") from error
        finally:
            while self._modules:
                self._modules.pop().restore()


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
    if isinstance(error, AssertionError) and "generation only" in text:
        return "it asks for log-likelihoods, and seecal's models only generate. Take its variant of type generate_until."
    if isinstance(error, ConnectionError) or "offline" in text.lower() or "couldn't reach" in text.lower():
        offline = any(os.environ.get(name) == "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
        remedy = "Unset HF_HUB_OFFLINE" if offline else "Connect to the network"
        text += f" Its data is on the hub. {remedy} once so that it is fetched, or redirect it (docs/evaluation.md)."
    return f"{type(error).__name__}: {text}"

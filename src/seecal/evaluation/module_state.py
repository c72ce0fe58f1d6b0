"""What a run of lmms-eval leaves behind in a process, put back.

Counters that a task keeps in its module: so that the next run does not add to them.

lmms-eval's OCRBench counts right answers in a dict of its module (``OCRBench_score``) that nothing ever sets back: where
two runs in one process share that module, the second result is the sum of both.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from PIL import ImageFile

_COUNTERS = (dict, list, set, int, float)  # and what is made of them: Counter, defaultdict


@contextlib.contextmanager
def damaged_images_refused() -> Iterator[None]:
    """An image that is cut off is an error; afterwards Pillow's rule is as before.

    lmms-eval, when it is imported, lets Pillow fill what is missing with grey, for the whole process: a score would not
    show it, and neither would a training after it.
    """
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


class ModuleState:
    """What the modules of a task's functions hold, kept from before a run for :meth:`restore`."""

    def __init__(self, functions: Iterable[Callable[..., Any]]) -> None:
        namespaces = {id(found): found for function in functions if (found := _namespace(function)) is not None}
        self._kept = [(namespace, _copies(namespace)) for namespace in namespaces.values()]

    def restore(self) -> None:
        """Each of them as it was, in the same object where it can be changed: other modules may hold it too."""
        for namespace, copies in self._kept:
            for name, value in copies.items():
                held = namespace.get(name)
                if isinstance(held, dict | set) and type(held) is type(value):
                    held.clear()
                    held.update(value)
                elif isinstance(held, list) and isinstance(value, list):
                    held[:] = value
                else:
                    namespace[name] = value


def _namespace(function: Callable[..., Any]) -> dict[str, Any] | None:
    while not hasattr(function, "__globals__") and hasattr(function, "func"):  # functools.partial
        function = function.func
    return getattr(function, "__globals__", None)


def _copies(namespace: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in namespace.items():
        if isinstance(value, _COUNTERS) and not name.startswith("__"):
            with contextlib.suppress(Exception):  # it holds what cannot be copied, so it is no counter
                found[name] = copy.deepcopy(value)
    return found


def functions_in(value: Any) -> Iterator[Callable[..., Any]]:
    """Every function in a task's configuration, whatever dicts and lists it lies in."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from functions_in(one)
    elif callable(value):
        yield value

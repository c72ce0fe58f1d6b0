"""An attribute of a collator that is the same in the training process and in all workers of its data loader.

Each worker has a copy of the collator, made when the worker starts. With ``dataloader_persistent_workers`` it starts once,
so what the training process sets later would never get there: the number lies in shared memory instead.
"""

from __future__ import annotations

from typing import Any

import torch


class SharedInt:
    """A descriptor for a whole number, usable as a dataclass field's default: ``epoch: int = SharedInt(0)``.

    What is handed to a worker shares it; other copies of the object get a number of their own when they set it.
    """

    def __init__(self, default: int) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_shared_{name}"

    def __get__(self, instance: Any, owner: type | None = None) -> int:
        return self._default if instance is None else int(instance.__dict__[self._name])

    def __set__(self, instance: Any, value: int) -> None:
        if self._name in instance.__dict__:
            instance.__dict__[self._name].share_memory_().fill_(value)  # deepcopy and pickle to a file unshare it
        else:
            instance.__dict__[self._name] = torch.tensor(value).share_memory_()

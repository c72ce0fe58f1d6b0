"""YAML as recipes are written in: plain values alone, no key twice, and no more of it than a recipe needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_LONGEST = 1 << 20  # characters
_MOST = 100_000  # values, those that an alias repeats counted as often as it does


def read_yaml(path: Path) -> Any:
    """What a recipe's file says: mappings, lists, texts, numbers; never an object of a class that it names.

    Raises:
        OSError: it cannot be read.
        ValueError: not valid YAML or UTF-8, a key twice, too long, too deep; aliases that stand for very many values or for
            themselves.
    """
    with path.open(encoding="utf8") as file:
        text = file.read(_LONGEST + 1)
    if len(text) > _LONGEST:
        raise ValueError(f"over {_LONGEST:,} characters: this is no recipe")
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from None
    except RecursionError:
        raise ValueError("not valid YAML: nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """Without silent replacement where a key stands twice, and with a limit on what aliases stand for."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _count(node, {})
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is set twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _count(node: Any, counted: dict[int, int | None]) -> int:
    """How many values a node stands for; ConstructorError for too many."""
    if id(node) not in counted:
        counted[id(node)] = None  # until it is counted: what comes back to it stands for itself
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [one for pair in inner for one in (pair if isinstance(pair, tuple) else (pair,))]
        counted[id(node)] = 1 + sum(_count(one, counted) for one in parts)
    found = counted[id(node)]
    if found is None or found > _MOST:
        what = (
            "an alias inside of what it stands for"
            if found is None
            else f"aliases that stand for over {_MOST:,} values"
        )
        raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
    return found

"""Write docs/api.md: every public name with its signature and the first sentence of its docstring.

    python -m scripts.api_page

Run it from the root of the repository after a public name or its docstring has changed. The names are those that
``seecal`` and its packages hand on; nothing is listed by hand here.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import seecal

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
_OURS = ("seecal", "builtins")
PACKAGES = ("core", "data", "evaluation", "families", "models", "models.mgm", "ops", "recipes", "scoring", "trainer")
_HEAD = """# Public names

Written by `python -m scripts.api_page` from the code; a test keeps it so. What is not here may change in any
version, what is here changes as [CONTRIBUTING.md](../CONTRIBUTING.md) says. `help(seecal.enable_cal)` shows a whole
docstring.
"""


def names() -> dict[str, list[str]]:
    """package -> the names that it hands on, each where it is met first: ``seecal``, then its packages."""
    found = {"seecal": sorted(seecal.__all__)}
    for package in PACKAGES:
        module = importlib.import_module(f"seecal.{package}")
        own = sorted(set(getattr(module, "__all__", ())) - set(seecal.__all__))
        if own:
            found[module.__name__] = own
    return found


def entry(package: str, name: str) -> str:
    """The lines of one name."""
    thing = getattr(importlib.import_module(package), name)
    if isinstance(thing, ModuleType):
        return f"`{package}.{name}`, a module: {_first(thing.__doc__)}"
    if isinstance(thing, (dict, tuple)):
        keys = ", ".join(f"`{key}`" for key in thing)
        row = f"dict of `{type(next(iter(thing.values()))).__name__}`" if isinstance(thing, dict) else "tuple"
        return f"`{package}.{name}`, a {row}: {keys}."
    arguments, returns = _signature(thing)
    call = f"{package}.{name}({', '.join(arguments)}){returns}"
    if len(call) > 116:
        call = "\n".join([f"{package}.{name}(", *(f"    {one}," for one in arguments), f"){returns}"])
    return f"```python\n{call}\n```\n\n{_first(inspect.getdoc(thing))}"


def _signature(thing: Any) -> tuple[list[str], str]:
    """(arguments, what is returned), as ``help`` shows them; of a class on top of another library's, what it adds."""
    parameters = list(inspect.signature(thing).parameters.values())
    above = [base for base in getattr(thing, "__mro__", ())[1:] if base.__module__.split(".")[0] not in _OURS]
    foreign = next((base for base in above if dataclasses.is_dataclass(base)), None)
    if foreign is not None:
        parameters = [one for one in parameters if one.name not in inspect.signature(foreign).parameters]
    arguments = [_argument(one) for one in parameters]
    keyword_only = [one.kind is inspect.Parameter.KEYWORD_ONLY for one in parameters]
    if True in keyword_only and not any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in parameters):
        arguments.insert(keyword_only.index(True), "*")
    if foreign is not None:
        arguments.append(f"**those of {foreign.__name__}")
    returned = inspect.signature(thing).return_annotation
    return arguments, "" if inspect.isclass(thing) else f" -> {_type(returned)}"


def _argument(parameter: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = f"{stars}{parameter.name}: {_type(parameter.annotation)}"
    if parameter.default is inspect.Parameter.empty:
        return text
    shown = repr(parameter.default)
    return f"{text} = {'…' if shown.startswith('<') else shown}"  # functions and default factories


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _first(doc: str | None) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join((doc or "").split("\n\n")[0].split())
    assert paragraph, "a public name without a docstring"
    paragraph = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", paragraph).replace("``", "`")
    return re.split(r"(?<=[a-z)`\]])\. (?=[A-Z`])", paragraph)[0].rstrip(".") + "."


def text() -> str:
    """The whole page."""
    parts = [_HEAD]
    for package, found in names().items():
        about = _first(importlib.import_module(package).__doc__)
        parts += [f"## {package}\n\n{about}\n", *(f"### {name}\n\n{entry(package, name)}\n" for name in found)]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(text(), "utf8")

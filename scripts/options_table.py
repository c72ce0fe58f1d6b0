"""Write the options of docs/recipes.md from the fields that hold them:

    python -m scripts.options_table

Run it from the root of the repository after an option was added or its help changed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml

from seecal import CALOptions

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
BEGIN, END = "<!-- the options: python -m scripts.options_table -->", "<!-- end of the options -->"


def section() -> str:
    """A YAML block with every default, and a table of what the options mean."""
    fields = dataclasses.fields(CALOptions)
    defaults = yaml.safe_dump({field.name: field.default for field in fields}, sort_keys=False).rstrip()
    rows = [f"| `{field.name}` | {field.metadata['help'].replace('|', chr(92) + '|')} |" for field in fields]
    return "\n".join(["```yaml", defaults, "```", "", "| option | |", "| --- | --- |", *rows])


def with_section(text: str) -> str:
    """The page with the section in place of its own."""
    return f"{text.split(BEGIN)[0]}{BEGIN}\n{section()}\n{END}{text.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(with_section(PAGE.read_text("utf8")), "utf8")

"""Write the table of keys in docs/data.md from the list that the check is made of:

    python -m scripts.keys_table

Run it from the root of the repository after a key was added or what becomes of it changed.
"""

from __future__ import annotations

from pathlib import Path

from seecal.data.sources.formats import KEYS, Key

PAGE = Path(__file__).parents[1] / "docs" / "data.md"
BEGIN, END = "<!-- the keys: python -m scripts.keys_table -->", "<!-- end of the keys -->"
_PLACES = {"row": "record", "message": "message or turn", "part": "part of a content"}


def section() -> str:
    """One row of the table for each row of the list, in its order."""
    return "\n".join(["| in a | key | in the formats | is | |", "| --- | --- | --- | --- | --- |", *map(_row, KEYS)])


def _row(key: Key) -> str:
    names = ", ".join(name if name.startswith("any other") else f"`{name}`" for name in key.names)
    formats = ", ".join(f"`{name}`" for name in key.formats) or "all"
    return f"| {_PLACES[key.where]} | {names} | {formats} | {key.fate} | {key.what} |"


def with_section(text: str) -> str:
    """The page with the section in place of its own."""
    return f"{text.split(BEGIN)[0]}{BEGIN}\n{section()}\n{END}{text.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(with_section(PAGE.read_text("utf8")), "utf8")

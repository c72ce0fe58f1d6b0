"""Write what imports what into docs/architecture.md, from the floors that tests/test_imports.py holds the code to:

    python -m scripts.architecture_page

Run it from the root of the repository after a file was added or moved.
"""

from __future__ import annotations

from pathlib import Path

from tests.test_imports import FLOORS

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
BEGIN, END = "<!-- the imports: python -m scripts.architecture_page -->", "<!-- end of the imports -->"


def imports() -> str:
    """One line a folder, the lowest first; what stands left of an arrow may be imported by what stands right of it."""
    lines = [
        f"{folder or 'seecal':<16}  {' → '.join(', '.join(sorted(floor)) for floor in floors)}".rstrip()
        for folder, floors in FLOORS.items()
    ]
    return "\n".join(["```", *lines, "```"])


def with_imports(text: str) -> str:
    """The page with these lines in place of its own."""
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{imports()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_imports(PAGE.read_text("utf8")), "utf8")

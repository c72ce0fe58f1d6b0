"""Write the table of docs/families.md from what the sweep of the tests measures (under a minute on one core):

    python -m scripts.families_table

Run it from the root of the repository after a family was added or changed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tests.support.zoo import drop_difference
from tests.support.zoo_models import ZOO

from seecal.cli.families import COLUMNS, table

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- the table: python -m scripts.families_table -->", "<!-- end of the table -->"
DIFFERENCE = 3  # the column that is measured goes before "needs"


def rows(names: list[str]) -> list[list[str]]:
    """What seecal says about each of these kinds of model: name and the other columns of ``seecal families``."""
    said = {family: rest for family, *rest in table()}
    return [[name, *said[name.split(",")[0]]] for name in sorted(names)]


def measured() -> list[list[str]]:
    """The rows of every kind in the zoo, with the largest difference."""
    found = rows(list(ZOO))
    for row in found:
        worst = drop_difference(row[0])
        row.insert(DIFFERENCE, f"{worst:.0e}" if worst < 1e-3 else f"{worst:.1f}")
    return found


def written(text: str) -> list[list[str]]:
    """The rows that the page has now."""
    lines = text.split(BEGIN)[1].split(END)[0].strip().splitlines()
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


def with_table(text: str, table_rows: list[list[str]]) -> str:
    """The page with these rows in place of its own."""
    columns = [*COLUMNS[:DIFFERENCE], "largest difference", *COLUMNS[DIFFERENCE:]]
    lines = [columns, ["---"] * len(columns), *([f"`{name}`", *rest] for name, *rest in table_rows)]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return "\n".join([before + BEGIN, *("| " + " | ".join(line) + " |" for line in lines), END + after])


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(with_table(PAGE.read_text("utf8"), measured()), "utf8")

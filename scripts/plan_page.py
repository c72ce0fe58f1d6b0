"""Write the plan that docs/plan.md shows:

    python -m scripts.plan_page

Run it from the root of the repository, where no model and no data of the recipe lie.
"""

from __future__ import annotations

from pathlib import Path

from seecal.planning.plan import plan

PAGE = Path(__file__).parents[1] / "docs" / "plan.md"
BEGIN, END = "<!-- plan: seecal plan --config llava-1.5-7b -->\n", "<!-- end of plan -->"


def with_plan(text: str) -> str:
    """The page's text with the plan as it is now."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}```text\n{plan('llava-1.5-7b')}\n```\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    PAGE.write_text(with_plan(PAGE.read_text("utf8")), "utf8")


if __name__ == "__main__":
    main()

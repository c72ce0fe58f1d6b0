"""What ``seecal demo`` prints at the end: one screen."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import emoji
from .files import Asked
from .state import DemoOptions, State

CAPTIONS_OF = (20, 70, 120)  # which unseen drawings are described at the end: fixed, not chosen by how it goes
SPLITS = {emoji.HELD_IMAGE: "unseen drawings", emoji.HELD_CONCEPT: "unseen concepts"}
QUESTIONS = ("name", "kind")
TABLE_COLUMNS = 3  # of the token table, side by side: 80 characters hold them
ENOUGH = 140  # steps in all, of batches of 16: words of the image have weights above 1 then (README has such a run)


@dataclass(frozen=True)
class Results:
    """What there is to show: figures, (true name, what the model writes), (token, Δ, weight) of one description."""

    options: DemoOptions
    state: State
    seconds: float
    asked: Asked
    items: Sequence[emoji.Emoji]
    final: Path
    page: Path
    steps: int
    image: Path
    captions: list[tuple[str, str]]
    described: str
    tokens: list[tuple[str, float, float]]


def report(results: Results, console: Console) -> None:
    """Figures, captions, one description's tokens, where everything is, what to run next."""
    console.print()
    console.print(figures(results))
    console.print()
    for name, text in results.captions:
        console.print(f"  [bold]{escape(name)}[/]: {escape(text)}", highlight=False, soft_wrap=True)
    console.print()
    console.print(token_table(results.described, results.tokens))
    for line in nothing_seen(results):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"\n{results.seconds / 60:.1f} minutes on {results.state.machine}.", highlight=False, soft_wrap=True)
    console.print(f"Model and processor: {results.final}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"Page to look at, tokens before CAL and after: {results.page}", highlight=False, markup=False, soft_wrap=True
    )
    console.print("Next:", style="bold")
    for command in next_commands(results):
        console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)


def figures(results: Results) -> Table:
    """Held-out figures: a row a measurement, unseen drawings and unseen concepts apart."""
    title = "Held out: nats per word token of the image, exact answers"
    caption = "drawings: new ones of known concepts; concepts: in no drawing seen before"
    table = Table(box=box.SIMPLE_HEAD, title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("", no_wrap=True)
    keys = [(split, question) for split in SPLITS for question in QUESTIONS]
    for split, question in keys:
        count = next(iter(results.state.scores.values()))[split, question].questions
        table.add_column(f"{SPLITS[split].split()[1]}\n{question}, n={count}", justify="right", no_wrap=True)
    for when, found in results.state.scores.items():
        table.add_row(when, *(f"{found[key].word_nll:.2f} {found[key].exact:4.0%}" for key in keys))
    table.add_row("commonest answer", *(f"{commonest(results, key):4.0%}" for key in keys), style="dim")
    return table


def commonest(results: Results, key: tuple[str, str]) -> float:
    """What guessing earns in one of the sets of questions."""
    return commonest_share(results.items, key[1], [answer for _, answer in results.asked[key]])


def commonest_share(items: Sequence[emoji.Emoji], question: str, answers: Sequence[emoji.Answer]) -> float:
    """Share that is right when all of ``answers`` are guessed to be the commonest one of the drawings trained on."""
    (guess, _), *_ = Counter(getattr(item, question) for item in emoji.by_split(items, emoji.TRAIN)).most_common(1)
    return sum(answer.text == guess for answer in answers) / len(answers)


def token_table(name: str, rows: list[tuple[str, float, float]]) -> Table:
    """(token, Δ, weight) of one description, read downwards, column by column."""
    title = f"True description of [bold]{escape(name)}[/]: token, Δ (logits), weight"
    table = Table(box=None, title=title, title_justify="left", show_header=False, padding=(0, 1), pad_edge=True)
    height = -(-len(rows) // TABLE_COLUMNS)
    for _ in range(TABLE_COLUMNS):
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(justify="right", no_wrap=True, style="bold")
    for line in range(height):
        cells: list[str] = []
        for token, delta, weight in rows[line::height]:
            style = "green" if weight > 2 else "dim" if weight <= 1.001 else ""
            shown = escape(token.replace("\n", "\\n"))
            cells += [f"[{style}]{shown}[/]" if style else shown, f"{delta:+.1f}", f"{weight:.1f}"]
        table.add_row(*cells)
    return table


def nothing_seen(results: Results) -> list[str]:
    """A line where the token table shows no weight above 1, which is no picture of CAL: what it means, what to do."""
    if any(weight > 1.001 for _, _, weight in results.tokens):
        return []
    said = "No Δ here is above 1, so all weights are 1, as in plain training"
    if results.steps >= ENOUGH:
        return [f"{said}."]
    longer = replace(results.options, out=Path(f"{results.options.out}-longer"), steps=ENOUGH, minutes=5.0)
    return [f"{said}: {results.steps} steps are few for learning to see. More: {longer.command()}"]


def next_commands(results: Results) -> list[str]:
    """Chat with the result, load it in Python, train again with another option or another recipe."""
    out, final = str(results.options.out), str(results.final)
    other = "uniform" if results.options.weighting != "uniform" else "cal"
    # As many steps as here, or the two could not be compared
    again = replace(results.options, out=Path(f"{out}-{other}"), weighting=other, steps=results.steps, minutes=5.0)
    load = f"import seecal, transformers as t; print(t.AutoModelForImageTextToText.from_pretrained('{final}'))"
    recipe, mine = shlex.quote(f"{out}/recipe.yaml"), shlex.quote(f"{out}/mine")
    return [
        f'seecal chat {shlex.quote(final)} {shlex.quote(str(results.image))} "{emoji.QUESTIONS["name"]}"',
        f'python -c "{load}"',
        again.command(),
        f"seecal train --config {recipe} --output_dir {mine}",
    ]

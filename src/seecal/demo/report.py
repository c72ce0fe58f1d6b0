"""What ``seecal demo`` prints at the end: one screen."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import emoji

SPLITS = {emoji.HELD_IMAGE: "unseen drawings", emoji.HELD_CONCEPT: "unseen concepts"}
QUESTIONS = ("name", "kind")
TABLE_COLUMNS = 3  # of the token table, side by side: 80 characters hold them


def report(state: Any, captions: list[tuple[str, str]], tokens: tuple, console: Console) -> None:
    """Results, captions, one sample's tokens, where everything is, what to run next."""
    console.print()
    console.print(results(state))
    console.print()
    for name, text in captions:
        console.print(f"  [bold]{escape(name)}[/]: {escape(text)}", highlight=False, soft_wrap=True)
    console.print()
    console.print(token_table(*tokens))
    minutes = (time.monotonic() - state.started) / 60
    console.print(f"\n{minutes:.1f} minutes on {state.notes[0]}.", highlight=False, soft_wrap=True)
    console.print(f"Model and processor: {state.folder}", highlight=False, markup=False, soft_wrap=True)
    console.print("Next:", style="bold")
    for command in next_commands(state):
        console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)


def results(state: Any) -> Table:
    """Held-out figures: a row a stage, unseen drawings and unseen concepts apart."""
    title = "Held out: nats per word token of the image, exact answers"
    caption = "drawings: new ones of known concepts; concepts: in no drawing seen before"
    table = Table(box=box.SIMPLE_HEAD, title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("", no_wrap=True)
    for split, label in SPLITS.items():
        for question in QUESTIONS:
            count = next(iter(state.scores.values()))[split, question].questions
            table.add_column(f"{label.split()[1]}\n{question}, n={count}", justify="right", no_wrap=True)
    for when, found in state.scores.items():
        cells = [found[split, question] for split in SPLITS for question in QUESTIONS]
        table.add_row(when, *(f"{cell.word_nll:.2f} {cell.exact:4.0%}" for cell in cells))
    cells = [f"{commonest(state, split, question):4.0%}" for split in SPLITS for question in QUESTIONS]
    table.add_row("commonest answer", *cells, style="dim")
    return table


def commonest(state: Any, split: str, question: str) -> float:
    """Share that is right when every question gets the commonest answer of the drawings trained on: what guessing earns."""
    answers = Counter(getattr(item, question) for item in emoji.by_split(state.items, emoji.TRAIN))
    (guess, _), asked = answers.most_common(1)[0], state.held_out(split)
    return sum(getattr(item, question) == guess for item in asked) / len(asked)


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


def next_commands(state: Any) -> list[str]:
    """Chat with the result, load it in Python, train again with another option."""
    item = state.held_out(emoji.HELD_IMAGE)[0]
    model, image = shlex.quote(str(state.folder)), shlex.quote(str(state.images[item.hexcode]))
    other = "uniform" if state.options.weighting != "uniform" else "cal"
    load = f"import seecal, transformers as t; print(t.AutoModelForImageTextToText.from_pretrained('{state.folder}'))"
    return [
        f'seecal chat {model} {image} "{emoji.QUESTIONS["name"]}"',
        f'python -c "{load}"',
        f"seecal demo --weighting {other} --out {shlex.quote(str(state.options.out) + '-' + other)}",
    ]

"""``seecal eval``: the options, nothing else. torch is loaded when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import verbosity
from . import eval_tasks


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder of a vision-language model, or its hub id.")],
    data: Annotated[str | None, typer.Option(help="The questions: a file or folder that seecal train reads.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="exact, vqa, anls, relaxed, ocr, cider, iou, choice, choice_mmt or choice_scienceqa."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the answers; the same command goes on there.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Instead of --data: tasks of lmms-eval, docvqa_val,chartqa,….")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="For --tasks: a folder with tasks of your own (YAML).")
    ] = None,
    answers: Annotated[
        str | None, typer.Option(help="Column with the true answers, a text or a list; else the last turn.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another model, or the folder of its answers: the difference, and its interval.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of a LoRA adapter to put on the model.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 8,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens; else 128, or what a task says.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many records, or documents of each task.")
    ] = None,
    on_bad: Annotated[
        str, typer.Option(help="Records that cannot be asked: error, or skip (counted, named).")
    ] = "error",
    column: Annotated[
        list[str] | None, typer.Option(help="What a key of the data is called here: KEY=NAME. Can be repeated.")
    ] = None,
    format: Annotated[str | None, typer.Option(help="Format of the data, where its keys do not tell.")] = None,
    image_root: Annotated[
        Path | None, typer.Option(help="Folder that image paths start from; else the data's.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Which split of a folder that has several.")] = None,
    dtype: Annotated[str, typer.Option(help="To load the model in: auto, float32, bfloat16, ….")] = "auto",
    paper: Annotated[
        str | None, typer.Option(help="Show the paper's figures of this benchmark beside: docvqa, chartqa, ….")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
) -> None:
    """Measure a model's answers to a local data set (--data, --metric), or to benchmarks of lmms-eval (--tasks).

    Stopped: the same command goes on.
    """
    if tasks is not None:
        others: dict[str, Any] = {"data": data, "metric": metric, "answers": answers, "against": against}
        others |= {"adapter": adapter, "column": column, "format": format, "image_root": image_root, "split": split}
        eval_tasks.refuse_others({**others, "paper": paper, "on_bad": on_bad != "error"})
        own: dict[str, Any] = {"include_path": include_path, "batch_size": batch_size, "limit": limit, "out": out}
        return eval_tasks.run(model, tasks, **own, max_new_tokens=max_new_tokens, dtype=dtype, seed=seed)
    if data is None or metric is None or out is None:
        raise ValueError("seecal eval needs --data, --metric and --out, or --tasks with names of lmms-eval's tasks")
    if include_path is not None:
        raise ValueError("--include-path is a folder with tasks of lmms-eval: name those with --tasks")
    settings: dict[str, Any] = {"adapter": adapter, "against": against, "out": out, "answers": answers}
    settings |= {"batch_size": batch_size, "max_new_tokens": max_new_tokens or 128, "limit": limit, "on_bad": on_bad}
    settings |= {"format": format, "image_root": image_root, "split": split, "dtype": dtype, "seed": seed}
    _measure(model, data, metric, paper, {**settings, "columns": _columns(column or [])})


def _measure(model: str, data: str, metric: str, paper: str | None, settings: dict[str, Any]) -> None:
    """Answers to local data, measured and printed."""
    from rich.console import Console

    from ..evaluation.paper import paper_rows
    from ..evaluation.run import evaluate as run

    beside = paper_rows(paper) if paper is not None else []
    verbosity.quiet()
    try:
        found = run(model, data, metric, console=Console(stderr=True), **settings)
    except KeyboardInterrupt:
        verbosity.say(f"{settings['out']}: stopped; the answers that are there stay, and the same command goes on.")
        raise
    first, *rest = found.sentences()
    print(first)
    Console(highlight=False).print(found.table(beside))
    for line in rest:
        print(line)


def _columns(named: list[str]) -> dict[str, str]:
    pairs = [one.partition("=") for one in named]
    for key, sign, name in pairs:
        if not (key and sign and name):
            raise ValueError(f"--column {key}{sign}{name}: expected KEY=NAME, such as question=prompt")
    return {key: name for key, _, name in pairs}

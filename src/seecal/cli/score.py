"""``seecal score``, ``filter`` and ``calibrate``: the options, nothing else. torch is loaded when a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import verbosity

_Model = Annotated[str, typer.Option(help="Folder of a vision-language model, or its hub id.")]
_Data = Annotated[str, typer.Option(help="What is scored: a file or folder that seecal train reads.")]
_Adapter = Annotated[Path | None, typer.Option(help="Folder of a LoRA adapter to put on the model.")]
_Contrast = Annotated[str, typer.Option(help="How the image is taken away (a name in seecal.CONTRASTS).")]
_MaxLength = Annotated[int | None, typer.Option(min=1, help="Longest record in tokens.")]
_BatchSize = Annotated[int, typer.Option(min=1, help="Records in one forward.")]
_OnBad = Annotated[str, typer.Option(help="Records that cannot be used: error, or skip (counted, and named).")]
_ImageRoot = Annotated[Path | None, typer.Option(help="Folder that image paths start from; else the data's own.")]
_Format = Annotated[str | None, typer.Option(help="Format of the data, where its keys do not tell.")]


def score(
    model: _Model,
    data: _Data,
    out: Annotated[Path, typer.Option(help="Folder for the Parquet files; the same command goes on there.")],
    adapter: _Adapter = None,
    contrast: _Contrast = "drop",
    contrast_strength: Annotated[float | None, typer.Option(help="Of a contrast on pixels.")] = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="Log-probabilities too, in nats.")] = False,
    weighting: Annotated[str, typer.Option(help="How Δ becomes the column weight.")] = "cal",
    alpha: Annotated[float, typer.Option(help="Lower bound for Δ, in logits.")] = 1.0,
    beta: Annotated[float, typer.Option(help="Upper bound for Δ, in logits.")] = 5.0,
    window: Annotated[int, typer.Option(help="Tokens in the mean over weights, odd.")] = 3,
    threshold: Annotated[float, typer.Option(help="For --weighting vig, in nats.")] = 0.0,
    max_length: _MaxLength = None,
    on_long: Annotated[
        str, typer.Option(help="Longer records: error (they are bad), or truncate (text after the last image).")
    ] = "error",
    batch_size: _BatchSize = 8,
    records_per_shard: Annotated[int, typer.Option(min=1, help="Records in one file.")] = 256,
    on_bad: _OnBad = "error",
    format: _Format = None,
    image_root: _ImageRoot = None,
    dtype: Annotated[str, typer.Option(help="To load the model in: auto, float32, bfloat16, ….")] = "auto",
) -> None:
    """Write Δ, logits and weight of every label token of a data set to Parquet; stopped: the same command goes on."""
    from ..core.options import CALOptions

    options = CALOptions(
        weighting=weighting,
        alpha=alpha,
        beta=beta,
        window=window,
        contrast=contrast,
        contrast_strength=contrast_strength,
        threshold=threshold,
    )
    from ..scoring.run import score as run

    verbosity.quiet()
    try:
        report = run(
            model,
            data,
            out,
            adapter=adapter,
            options=options,
            logprobs=logprobs,
            max_length=max_length,
            on_long=on_long,
            batch_size=batch_size,
            records_per_shard=records_per_shard,
            on_bad=on_bad,
            format=format,
            image_root=image_root,
            dtype=dtype,
        )
    except KeyboardInterrupt:
        verbosity.say(f"{out}: stopped; the shards that are there are whole, and the same command goes on.")
        raise
    verbosity.say(report.sentence())


def filter_(
    scores: Annotated[Path, typer.Argument(help="Folder that seecal score wrote.")],
    out: Annotated[Path, typer.Option(help="The file to write, in the data's own format.")],
    data: Annotated[str | None, typer.Option(help="The data that was scored, if it was moved.")] = None,
    image_root: _ImageRoot = None,
    max_contradictory: Annotated[
        float | None, typer.Option(help="Largest share of a record's tokens with Δ below --below.")
    ] = None,
    below: Annotated[float, typer.Option(help="From which Δ on a token is contradictory, in logits.")] = -1.0,
    min_delta: Annotated[float | None, typer.Option(help="Least mean Δ of a record, in logits.")] = None,
    top: Annotated[float | None, typer.Option(help="Share of the records with images to keep.")] = None,
    by: Annotated[str, typer.Option(help="What --top compares: delta, or gain (nats; needs --logprobs).")] = "delta",
    tokens: Annotated[
        bool,
        typer.Option("--tokens", help="Weight 0 for tokens with Δ below --below (--by gain: below --top's threshold)."),
    ] = False,
    invert: Annotated[bool, typer.Option("--invert", help="Write what would go instead, to look at.")] = False,
) -> None:
    """Write a scored data set without the records, or tokens, that the image speaks against."""
    from ..scoring.selection import filter as run

    verbosity.quiet()
    rules: dict[str, Any] = {"max_contradictory": max_contradictory, "below": below, "min_delta": min_delta}
    rules |= {"top": top, "by": by, "tokens": tokens, "invert": invert}
    report = run(scores, out, data=data, image_root=image_root, **rules)
    text_only = f"{report.text_only} without an image"
    if invert:
        verbosity.say(
            f"{out}: what would go; {report.kept} rows would stay ({text_only}), {report.removed} go: {report.log}"
        )
    else:
        verbosity.say(f"{out}: {report.kept} rows kept ({text_only}), {report.removed} removed: {report.log}")
    if tokens:
        verbosity.say(
            f"  {report.tokens_removed} of the {report.tokens} label tokens in the rows that stay get weight 0"
        )
    if report.not_finite:
        verbosity.say(f"  {report.not_finite} label tokens have a score that is no finite number, and count nowhere")
    for why, count in sorted(report.reasons.items()):
        verbosity.say(f"  {count} {why}")
    if report.threshold is not None:
        verbosity.say(f"  threshold: {report.threshold:.4g} {'nats' if by == 'gain' else 'logits'}")
        if by == "gain":
            verbosity.say(f"weighting: vig\nthreshold: {report.threshold:.4g}")


def calibrate(
    model: Annotated[str | None, typer.Option(help="Folder of a vision-language model, or its hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="What it is measured on.")] = None,
    scores: Annotated[Path | None, typer.Option(help="Instead of both: a folder that seecal score wrote.")] = None,
    at_alpha: Annotated[float, typer.Option(help="Share of the tokens at or below alpha.")] = 0.5,
    at_beta: Annotated[float, typer.Option(help="Share of the tokens at or above beta.")] = 0.1,
    adapter: _Adapter = None,
    max_length: _MaxLength = None,
    batch_size: _BatchSize = 8,
    on_bad: _OnBad = "error",
    format: _Format = None,
    image_root: _ImageRoot = None,
) -> None:
    """Propose alpha and beta for a model from where its Δ lies, as lines for a recipe."""
    from ..scoring.calibration import calibrate as run

    verbosity.quiet()
    scoring: dict[str, Any] = {"adapter": adapter, "max_length": max_length, "batch_size": batch_size}
    scoring |= {"on_bad": on_bad, "format": format, "image_root": image_root}
    from rich.console import Console

    scoring["console"] = Console(stderr=True)  # what is printed can go into a recipe
    verbosity.say(run(model, data, scores=scores, at_alpha=at_alpha, at_beta=at_beta, **scoring).yaml())

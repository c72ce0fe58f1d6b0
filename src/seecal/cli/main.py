"""The command line. Nothing heavy is imported before a command really runs: ``seecal --help`` answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import verbosity
from . import build_start, check_data, convert, evaluate, export, plan, preview, replay, report, score

# typer does not export it, and has moved it between versions: unknown options, missing arguments, wrong types
_UsageError: Any = typer.BadParameter.__base__

_DRY_RUN = {"--dry-run", "--dry_run"}

app = typer.Typer(
    name="seecal",
    help="Train vision-language models on the tokens that see the image.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _root() -> None:
    """Train vision-language models on the tokens that see the image."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for images, records, recipe and model.")] = Path("seecal-demo"),
    minutes: Annotated[float, typer.Option(min=0.1, help="Time for training and measuring.")] = 5.0,
    steps: Annotated[
        int | None,
        typer.Option(min=2, help="Steps of both stages together, however long they take.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions in a step.")] = 16,
    held_out: Annotated[
        int | None,
        typer.Option(min=1, help="Drawings at most in each held-out measurement; as many as fit.", show_default=False),
    ] = None,
    weighting: Annotated[
        str, typer.Option(help="Token weights of stage 2: cal, or uniform for plain training.")
    ] = "cal",
    seed: Annotated[int, typer.Option(help="Same seed, steps and machine: same results.")] = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="CAL and plain training from one stage 1, with intervals.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="With --compare: trainings of either.")] = 1,
) -> None:
    """Train a real small vision-language model with CAL on real images (CPU, a few minutes); again: go on."""
    # Before torch is loaded. Its threads otherwise spin while they wait for each other: on two cores that other programs
    # were using too, that made a forward pass several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from rich.console import Console

    from ..demo.run import DemoOptions, run

    if weighting not in ("cal", "uniform"):
        raise ValueError(f"--weighting {weighting}: expected cal or uniform")
    options = DemoOptions(out, minutes, steps, batch_size, held_out, weighting, seed, compare, seeds)
    if compare:
        from ..demo.compare import compare as run
    elif seeds != 1:
        raise ValueError(f"--seeds {seeds} is how many trainings of either arm --compare makes: add --compare")
    raise typer.Exit(run(options, Console()))


# what follows goes to what the command runs, --help too
_ALL_TO_IT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(add_help_option=False, context_settings=_ALL_TO_IT)
def train(context: typer.Context) -> None:
    """Train a model by a recipe: --config FILE, or the name of one of ours (see seecal train --help)."""
    if _DRY_RUN.intersection(context.args) and not {"--help", "-h", "--help-all"}.intersection(context.args):
        verbosity.quiet()
        from ..recipes.dry_run import run as run_dry

        raise typer.Exit(run_dry([one for one in context.args if one not in _DRY_RUN]))
    from ..recipes.run import run

    raise typer.Exit(run(context.args))


@app.command()
def accelerate_config(
    name: Annotated[
        str | None, typer.Argument(help="single, ddp, fsdp2, zero2 or zero3; without it, what each is for.")
    ] = None,
) -> None:
    """Print the path of a file for accelerate launch --config_file: "$(seecal accelerate-config fsdp2)"."""
    from ..recipes import launch

    if name is None:
        for known, purpose in launch.accelerate_configs().items():
            print(f"{known:<8} {purpose}")
    else:
        print(launch.accelerate_config(name))


@app.command()
def tiny_folder(
    folder: Annotated[Path, typer.Argument(help="Where to write them.")] = Path("out/tiny"),
) -> None:
    """Write the tiny model and data that the recipe tiny trains (offline, seconds)."""
    from ..recipes.tiny import tiny_folder

    verbosity.quiet()
    print(f"{tiny_folder(folder)}: model, data.json, eval.json")


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Folder of a vision-language model, or its hub id.")],
    image: Annotated[Path, typer.Argument(help="Image file.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
) -> None:
    """Ask a vision-language model about an image. On the GPU if there is one."""
    from ..data.images.decode import open_image

    open_image(image)  # before the model is loaded: a wrong path should not take a minute to show
    from ..models.generate import load, reply

    verbosity.quiet()
    network, processor = load(model)
    reply(network, processor, image, question, max_new_tokens=max_new_tokens, on_text=_write)
    _write("\n")


@app.command()
def families(
    check: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Run the self-test on this model: a folder, or a hub id.")
    ] = None,
) -> None:
    """The model families, and what is exact on each; with --check, whether CAL is exact on a checkpoint of yours."""
    if check is None:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        from .families import brief, notes

        columns, rows = brief()
        shown = Table(*columns, box=box.SIMPLE_HEAD)
        for row in rows:
            shown.add_row(*row)
        console = Console(highlight=False)
        console.print(shown)
        for note in notes():
            console.print(f" {note}", markup=False)
        console.print(" Exact: dropping the image gives what masking it gives.", markup=False)
        console.print(" Others are tested on their first batch; --check MODEL tests a checkpoint.", markup=False)
        return
    from ..models.loading import load_vlm
    from .families import check as run_check

    verbosity.quiet()
    model, _ = load_vlm(check, processor=False)
    verdict, lines = run_check(model)
    print(lines)
    raise typer.Exit(1 if verdict.leaks else 0)


@app.command(add_help_option=False, context_settings=_ALL_TO_IT)
def bench(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="A script under benchmarks/: step, loss, …; gpu takes every GPU figure.")
    ] = None,
) -> None:
    """Run a benchmark; what follows its name goes to it, --help too (try seecal bench step --help)."""
    from .bench import names, run

    if name is None or name in ("--help", "-h"):
        print(context.get_help())
        print(f"There are: {', '.join(names()) or 'none here, they are scripts of the source checkout'}.")
        return
    raise typer.Exit(run(name, context.args))


app.command()(score.score)
app.command("filter")(score.filter_)
app.command()(score.calibrate)
app.command()(report.report)
_KEYS_TOO = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(context_settings=_KEYS_TOO)(preview.preview)
app.command("check-data", context_settings=_KEYS_TOO)(check_data.check_data)
app.command()(replay.replay)
app.command("build-start")(build_start.build_start)
app.command()(convert.convert)
app.command()(export.merge)
app.command()(export.export)
app.command(context_settings=_KEYS_TOO)(plan.plan)
app.command("eval")(evaluate.evaluate)


def _write(text: str) -> None:
    sys.stdout.write(verbosity.written_out(text))
    sys.stdout.flush()


def _complain(text: str) -> None:
    """One line on stderr. What it quotes of the data is shown: a terminal must not obey it."""
    print("seecal: " + verbosity.written_out(" ".join(text.split())), file=sys.stderr)


def main() -> None:
    """Entry point: what a user can mend is one line on stderr and exit code 2, without a traceback."""
    try:
        _run()
    except SystemExit as end:
        if "torch.distributed" in sys.modules and isinstance(end.code, int):
            from ..ops.distributed import leave

            leave(end.code)
        raise


def _run() -> None:
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="seecal", standalone_mode=False) or 0)
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "seecal"
        _complain(f"{error.format_message().rstrip('.')}. See {command} --help")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:  # a folder that may not be written, a full disk, a name that is too long
        said = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        _complain(said)
        sys.exit(2)
    except (ValueError, ImportError) as error:
        _complain(str(error))
        sys.exit(2)

"""``seecal score``: Δ, logits and weights of every label token of a data set, as Parquet files."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from ..core.options import CALOptions, check_choice
from ..data.images.decode import decode_image
from ..data.options import check_on_bad, check_train_on
from ..data.sources.load import Located
from ..models.loading import load_vlm
from ..models.trusted_files import check_adapter
from ..verbosity import Progress, written_out
from .manifest import Manifest, begin, digest_of_processor, digest_of_weights, versions
from .measure import Scorer
from .records import Data
from .shards import Skipped, columns, is_there, note, path_of, write

ON_LONG = ("error", "truncate")
_NAMED = 20  # skipped records that a report holds; the shards have all of them


@dataclass
class ScoreReport:
    """What a folder of scores holds.

    Attributes:
        folder: where it is.
        shards: how many Parquet files the whole set has.
        missing: how many of them are not written yet (by other ranks, or because the run was stopped).
        records: how many records have scores.
        tokens: how many label tokens those have.
        with_contrast: how many of those have an image before them.
        skipped: how many rows of the data have none.
        first_skipped: the first 20 of those.
    """

    folder: Path
    shards: int
    missing: int = 0
    records: int = 0
    tokens: int = 0
    with_contrast: int = 0
    skipped: int = 0
    first_skipped: list[Skipped] = field(default_factory=list)

    def sentence(self) -> str:
        """One line for people."""
        line = f"{self.folder}: {self.tokens} label tokens of {self.records} records in {self.shards} shards"
        if self.missing:
            line += f", {self.missing} of them still missing"
        if self.tokens and not self.with_contrast:
            line += "; none has an image before it, so Δ is 0 everywhere"
        if self.skipped:
            line += f"; {self.skipped} rows left out, the first: {self.first_skipped[0].reason}"
        return written_out(line)


def score(
    model: Any,
    data: Any,
    out: str | Path,
    *,
    processor: Any = None,
    adapter: str | Path | None = None,
    options: CALOptions | None = None,
    logprobs: bool = False,
    max_length: int | None = None,
    on_long: str = "error",
    batch_size: int = 8,
    records_per_shard: int = 256,
    on_bad: str = "error",
    train_on: str = "all",
    format: str | None = None,
    image_root: str | Path | None = None,
    dtype: Any = "auto",
    console: Any = None,
) -> ScoreReport:
    """Writes Δ, both logits and the weight of every label token of a data set to Parquet files, one row a token.

    Can be stopped at any moment and called again: shards that are there are kept, and the rest comes out the same. Started
    by ``accelerate launch``, each process takes its share of the shards.

    Args:
        model: a folder, a hub id, or a loaded vision-language model (then ``processor`` too; it is left as it was).
        data: what :func:`seecal.load_records` takes or returns, or :func:`seecal.mix` returns.
        out: the folder for ``scores-*.parquet`` and ``_manifest.json``.
        processor: of the model; None: from the model's folder.
        adapter: the folder of a LoRA adapter to put on the model.
        options: contrast, weighting and so on; None: the paper's.
        logprobs: also ``logprob_with`` and ``logprob_without``, in nats: a vocabulary projection in either pass.
        max_length, on_long: records of more tokens are bad ("error"), or cut after their last image ("truncate").
        batch_size: records in one forward.
        records_per_shard: rows of the data in one file; what a kill loses at most.
        on_bad: records that cannot be used: "error" stops and names the first; "skip" leaves them out and counts them.
        train_on: "all" of the assistant's turns have scores, or only the "last" of each record.
        format, image_root: of the data, as of :func:`seecal.load_records`.
        dtype: to load the model in; "auto": as it was saved.
        console: a rich console for the progress.

    Raises:
        ValueError: an option out of its range, a model or data that cannot be used, or an ``out`` that holds scores of
            something else, naming what differs.
        FileNotFoundError: no such data.
    """
    settings = ScoreSettings(
        options or CALOptions(), logprobs, max_length, on_long, batch_size, records_per_shard, on_bad, train_on
    )
    source = Data(data, format, image_root)  # a wrong path should not take a model's loading to show
    return score_with(source, lambda: loaded(model, processor, adapter, dtype), Path(out), settings, console)


@dataclass(frozen=True)
class ScoreSettings:
    """What of the arguments changes a number or a row; the names are those of :func:`score`."""

    options: CALOptions
    logprobs: bool
    max_length: int | None
    on_long: str
    batch_size: int
    records_per_shard: int
    on_bad: str
    train_on: str = "all"

    def __post_init__(self) -> None:
        check_on_bad(self.on_bad)
        check_train_on(self.train_on)
        check_choice("on_long", self.on_long, ON_LONG)
        for name in ("batch_size", "records_per_shard"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a whole number of records, 1 or more")
        if self.options.pool_scope == "released":
            raise ValueError(
                "pool_scope='released' lets a token's weight depend on the other records of its batch, so it is no score "
                "of its record. Set pool_scope='answer'."
            )

    def manifest(self, model: dict[str, Any], data: dict[str, Any]) -> Manifest:
        named = dataclasses.asdict(self)
        size = named.pop("records_per_shard")
        for later in dataclasses.fields(
            self
        ):  # what came later: scores that are there already were made by its default
            if later.default is not dataclasses.MISSING and named[later.name] == later.default:
                del named[later.name]
        if named["options"]["prior_exponent"] == CALOptions.prior_exponent:
            del named["options"]["prior_exponent"]
        return Manifest(model, data, named | named.pop("options"), list(columns(self.logprobs)), size, versions())

    def scorer(self, model: Any, processor: Any) -> Scorer:
        rest = {name: getattr(self, name) for name in ("max_length", "on_long", "batch_size", "on_bad", "train_on")}
        return Scorer(model, processor, self.options, self.logprobs, **rest)


def score_with(data: Data, load: Callable[[], Any], folder: Path, settings: ScoreSettings, console: Any) -> ScoreReport:
    """:func:`score` by what ``load`` returns: (model, processor, what the manifest says of both)."""
    rank, ranks = _place_among_ranks()
    with Progress(console, shown=rank == 0) as progress:
        with progress.task("read the data") as task:
            fingerprint, rows = data.fingerprint(settings.on_bad, task.advance)
        model, processor, told = load()
        where = {"name": data.name, "format": data.format, "image_root": list(data.roots)}
        manifest = settings.manifest(told, {**where, "fingerprint": fingerprint, "rows": rows})
        begin(folder, manifest)
        mine = range(rank, manifest.shards, ranks)
        missing = {number for number in mine if not is_there(folder, number, manifest)}
        training = model.training
        model.eval()
        try:
            _score_shards(settings.scorer(model, processor), data, folder, manifest, missing, mine, progress)
        finally:
            model.train(training)
    return report_of(folder, manifest)


def report_of(folder: Path, manifest: Manifest) -> ScoreReport:
    """What lies in the folder by now."""
    report = ScoreReport(folder, manifest.shards)
    for number in range(manifest.shards):
        if not path_of(folder, number).exists():
            report.missing += 1
            continue
        said = note(folder, number, manifest)
        report.records += said.records
        report.tokens += said.tokens
        report.with_contrast += said.with_contrast
        report.skipped += len(said.skipped)
        report.first_skipped += said.skipped[: _NAMED - len(report.first_skipped)]
    return report


def _place_among_ranks() -> tuple[int, int]:
    """(rank, how many): as accelerate launch and torchrun tell their processes. The ranks need not talk to each other."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def loaded(model: Any, processor: Any, adapter: str | Path | None, dtype: Any) -> tuple[Any, Any, dict[str, Any]]:
    """(the model on its device, its processor, what the manifest says of both)."""
    import torch

    if isinstance(model, (str, Path)):
        network, own = load_vlm(str(model), dtype=dtype, processor=processor is None)
        processor = processor or own
        if torch.cuda.is_available():
            network = network.to(f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}")
        name = str(model)
    else:
        network, name = model, str(getattr(model, "name_or_path", "") or type(model).__name__)
    if processor is None:
        raise ValueError(f"model is a loaded {type(network).__name__}: pass processor=..., the one that belongs to it.")
    if adapter is not None:
        network = _with_adapter(network, Path(adapter))
    return network, processor, told_of(network, processor, name, adapter)


def told_of(network: Any, processor: Any, name: str, adapter: str | Path | None) -> dict[str, Any]:
    """What the manifest says of a model and its processor."""
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in network.parameters()})
    return {
        "name": name,
        "adapter": None if adapter is None else str(adapter),
        "weights": digest_of_weights(network),
        "processor": digest_of_processor(processor),
        "dtype": ", ".join(dtypes),
    }


def _with_adapter(model: Any, adapter: Path) -> Any:
    """The model with a LoRA adapter beside its weights, not merged: merging would round them."""
    from peft import PeftModel

    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"{adapter}: no adapter_config.json here. Set adapter to the folder that PEFT saved.")
    check_adapter(adapter)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, str(adapter)).eval()
        except (UserWarning, KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{adapter}: this adapter does not fit the model ({reason})") from None


def _score_shards(
    scorer: Scorer, data: Data, folder: Path, manifest: Manifest, missing: set[int], mine: range, progress: Progress
) -> None:
    """Writes the missing shards, one after the other; what stops it leaves those that are done."""
    size, rows_in_all = manifest.records_per_shard, int(manifest.data["rows"])

    def rows_of(numbers: Iterable[int]) -> int:
        return sum(min(size, rows_in_all - number * size) for number in numbers)

    total = rows_of(mine)
    with progress.task("score", total=total, unit="record", done=total - rows_of(missing)) as task:
        if not missing:
            return
        spares = _spares(data, size) if scorer.options.contrast == "swap" else {}
        for number, rows in _shards_of(data, size, missing):
            spare = next((image for of_shard, image in spares.items() if of_shard != number), None)
            values, said = scorer.shard(rows, task.advance, spare)
            write(folder, number, manifest, values, said)


def _shards_of(data: Data, size: int, missing: set[int]) -> Iterator[tuple[int, list[Located]]]:
    """(number, rows) of each missing shard. Of the others not even the images' paths are looked at."""
    numbered = enumerate(data.rows(lambda number: number // size in missing))
    for number, rows in groupby(numbered, lambda pair: pair[0] // size):
        if number in missing:
            yield number, [row for _, row in rows]


def _spares(data: Data, size: int) -> dict[int, Any]:
    """The first image of the first two shards that have any that opens: one of them is never a shard's own."""
    found: dict[int, Any] = {}
    for place, row in enumerate(data.rows()):
        if row.record is None or place // size in found or not row.record["images"]:
            continue
        with contextlib.suppress(ValueError, OSError):  # said when its own shard is scored
            found[place // size] = decode_image(row.record["images"][0], row.record["id"])
        if len(found) == 2:
            break
    return found

"""What an answer looks at, and what the patches of an image say: the numbers of the paper's Figures 5 and 6.

Attention from each token of an answer to the patches of the images, and the words of the vocabulary whose embeddings lie
nearest to what the language model receives for each patch. One record at a time: one forward for both, and those of Δ.

L tokens of a record, H heads, N label tokens, P image tokens, C cells of a grid, D width.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.options import CALOptions
from ..data.collators.conversation import ConversationEncoder
from ..data.images.decode import decode_image
from ..data.message_keys import unpacked
from ..data.sources.load import Located
from ..families.image_grids import ImageGrid
from ..families.table import FAMILIES, check_vlm, decoder_of, family_of, image_ids, unwrap
from ..models.loading import load_vlm
from .measure import Scorer
from .records import Data
from .spans import LabelToken
from .vocabulary import Words

_NEAREST = 5  # words a patch
Array = np.ndarray[Any, Any]


@dataclass
class AlignedImage:
    """One image of a record under one model.

    Attributes:
        picture: a Pillow image, what the grid lies over: the pixels that the vision tower got where it gets a picture, else
            the whole image.
        rows, columns: of the grid of its tokens.
        attention: [N, rows, columns] float32, the share of each answer token's attention that goes to each cell.
        words: rows × columns lists of the nearest words, each with its cosine, the nearest first.
        left_out: image tokens outside the grid (a class token, tiles of a finer grid and the ends of their lines).
    """

    picture: Any
    rows: int
    columns: int
    attention: Array
    words: list[list[tuple[str, float]]]
    left_out: int = 0


@dataclass
class AlignedRecord:
    """One record under one model.

    Attributes:
        source, row, record: its place in the data, and its id.
        questions: for each answer, what the user says before it.
        tokens: N label tokens, in order.
        delta: [N] in logits.
        has_contrast: [N] bool.
        images: in the order of their placeholders.
        more: label tokens beyond ``max_tokens``, which are not among ``tokens``.
    """

    source: str
    row: int
    record: str
    questions: list[str]
    tokens: list[LabelToken]
    delta: Array
    has_contrast: Array
    images: list[AlignedImage]
    more: int = 0


@dataclass
class AlignedModel:
    """What one model shows.

    Attributes:
        name: its folder or hub id, or its class.
        family: its ``model_type``.
        layer, layers: the decoder layer whose attention it is, from 0, and how many there are.
        words: how many tokens of the vocabulary were compared.
        records: in the order of the data.
    """

    name: str
    family: str
    layer: int
    layers: int
    words: int
    records: list[AlignedRecord] = field(default_factory=list)


def align(
    model: Any,
    rows: Sequence[Located],
    *,
    processor: Any = None,
    layer: int | None = None,
    max_tokens: int = 64,
    dtype: Any = "auto",
) -> AlignedModel:
    """Attention of answers to patches and the nearest words of patches, of one model on a few records.

    Args:
        model: a folder, a hub id, or a loaded model (with its ``processor``), which is left as it was.
        rows: of :func:`chosen`.
        layer: of the decoder, from 0; negative from the end. None: the one in the middle of those with attention.
        max_tokens: label tokens of a record that are looked at, its first.
        dtype: to load the model in.

    Raises:
        ValueError: a family whose image tokens form no known grid, a layer that is not there or has no attention weights, a
            record without images or whose image tokens form no grid; names it.
    """
    network, processor, name = _opened(model, processor, dtype)
    inner = unwrap(network)
    check_vlm(inner)
    family = family_of(inner)
    if family.grid is None:
        known = ", ".join(sorted(name for name, row in FAMILIES.items() if row.grid is not None))
        raise ValueError(
            f"{name}: seecal does not know which part of an image each image token of the family "
            f"{inner.config.model_type!r} is. The alignment works with {known}."
        )
    chosen_layer, layers = _layer_of(decoder_of(inner), layer, name)
    words = Words.of(inner, processor.tokenizer)
    scorer = Scorer(network, processor, CALOptions(), batch_size=1)
    found = AlignedModel(name, inner.config.model_type, chosen_layer, layers, len(words.texts))
    training = network.training
    network.eval()
    try:
        for row in rows:
            found.records.append(_aligned(scorer, inner, row, chosen_layer, words, max_tokens))
    finally:
        network.train(training)
    return found


def chosen(
    data: Any, ids: Sequence[str], *, format: str | None = None, image_root: str | Path | None = None
) -> list[Located]:
    """The rows of the data with these ids, in the order of ``ids``; all of them where an id stands there several times.

    Raises:
        ValueError: an id that no record has, or a record without images; names it.
        FileNotFoundError: no such data.
    """
    if not ids:
        raise ValueError("ids: name one record at least")
    source, found, some, first_bad = Data(data, format, image_root), dict[str, list[Located]](), list[str](), None
    for row in source.rows():
        if row.record is None:
            first_bad = first_bad or row.error
            continue
        name = str(row.record["id"])
        if len(some) < 3:
            some.append(name)
        if name in ids:
            found.setdefault(name, []).append(row)
    if missing := [name for name in dict.fromkeys(ids) if name not in found]:
        bad = f" A record that cannot be used: {first_bad}" if first_bad else ""
        raise ValueError(
            f"{source.name}: no record has the id {', '.join(map(repr, missing))}. Its ids are such as "
            f"{', '.join(map(repr, some))}.{bad}"
        )
    rows = [row for name in dict.fromkeys(ids) for row in found[name]]
    for row in rows:
        if row.record is not None and not row.record["images"]:
            raise ValueError(
                f"{source.name}: record {row.record['id']!r} (row {row.row}) has no image, so nothing to "
                "look at. Leave it out."
            )
    return rows


def _opened(model: Any, processor: Any, dtype: Any) -> tuple[Any, Any, str]:
    """(the model on its device, its processor, its name)."""
    if isinstance(model, (str, Path)):
        network, own = load_vlm(str(model), dtype=dtype, processor=processor is None)
        return (network.to("cuda") if torch.cuda.is_available() else network), processor or own, str(model)
    if processor is None:
        raise ValueError(f"model is a loaded {type(model).__name__}: pass processor=..., the one that belongs to it.")
    return model, processor, str(getattr(model, "name_or_path", "") or type(model).__name__)


def _layer_of(decoder: Any, layer: int | None, name: str) -> tuple[int, int]:
    """(the layer's number from 0, how many there are)."""
    count = len(decoder.layers)
    with_attention = [number for number, one in enumerate(decoder.layers) if hasattr(one, "self_attn")]
    if not with_attention:
        raise ValueError(
            f"{name}: none of the {count} layers of {type(decoder).__name__} has a self_attn to read from."
        )
    if layer is None:
        return with_attention[len(with_attention) // 2], count
    if not -count <= layer < count:
        raise ValueError(f"layer={layer}: {name} has layers 0 to {count - 1} (or -{count} to -1).")
    if layer % count not in with_attention:
        having = ", ".join(map(str, with_attention))
        raise ValueError(f"layer={layer}: that layer of {name} has no attention; those that have: {having}.")
    return layer % count, count


def _aligned(scorer: Scorer, model: Any, row: Located, layer: int, words: Words, max_tokens: int) -> AlignedRecord:
    assert row.record is not None
    name = f"{row.source}: record {row.record['id']!r}"
    batch, tokens = scorer.collated(row)
    delta = scorer.measure(batch)
    ids_L = batch["input_ids"][0]
    places = np.flatnonzero(np.isin(ids_L.numpy(), sorted(image_ids(model.config))))
    runs = [len(list(run)) for _, run in groupby(places - np.arange(len(places)))]
    conversation = ConversationEncoder(scorer.processor).encode(row.record, name)
    originals = [decode_image(image, name) for image in conversation.images]
    grids = _grids(model, batch, runs, len(originals), len(places), name)
    more = max(0, len(tokens) - max_tokens)
    tokens = tokens[:max_tokens]
    predecessors = delta.position[: len(tokens)] - 1
    attention_NP, features_PD = _looked_at(model, batch, layer, predecessors, places)
    images, begin = [], 0
    for grid, original in zip(grids, originals, strict=True):
        cells = slice(begin + grid.first, begin + grid.first + grid.rows * grid.columns)
        images.append(
            AlignedImage(
                _picture(batch, grid, original, scorer.processor),
                grid.rows,
                grid.columns,
                attention_NP[:, cells].reshape(-1, grid.rows, grid.columns),
                words.nearest(features_PD[cells], _NEAREST),
                grid.tokens - grid.rows * grid.columns,
            )
        )
        begin += grid.tokens
    count = len(tokens)
    return AlignedRecord(
        row.source,
        row.row,
        str(row.record["id"]),
        _questions(row.record),
        tokens,
        delta.delta[:count].cpu().numpy(),
        delta.has_contrast[:count].cpu().numpy(),
        images,
        more,
    )


def _grids(model: Any, batch: Any, runs: list[int], images: int, tokens: int, name: str) -> list[ImageGrid]:
    """The family's grid of each image, or ValueError that names the record."""
    family = family_of(model)
    assert family.grid is not None
    try:
        grids = family.grid(model.config, batch, runs, images)
        told = sum(grid.tokens for grid in grids)
        if len(grids) != images or told != tokens:
            raise ValueError(f"{len(grids)} grids of {told} cells in all for {images} images of {tokens} tokens")
    except ValueError as error:
        raise ValueError(
            f"{name}: its image tokens form no grid that seecal knows for the family {family.name!r}: {error}. Set the "
            "processor's tiles or crops of an image to one, or choose another record."
        ) from None
    return grids


@torch.no_grad()
def _looked_at(model: Any, batch: Any, layer: int, queries: Tensor, places: Array) -> tuple[Array, Tensor]:
    """(the layer's attention from ``queries`` to ``places``, a mean over heads, [N, P]; what the decoder is given at
    ``places``, [P, D]). Every layer makes weights, of one layer those of the queries are kept."""
    base, decoder = model.base_model, decoder_of(model)
    accepted = inspect.signature(inspect.unwrap(type(base).forward)).parameters
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    inputs = {
        name: value.to(device, dtype if value.is_floating_point() else None)
        for name, value in batch.items()
        if isinstance(value, Tensor) and name != "labels" and (name in accepted or "kwargs" in accepted)
    }
    kept: dict[str, Tensor] = {}

    def keep_features(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        kept["features"] = kwargs["inputs_embeds"][0, places].float().cpu()

    def keep_attention(module: Any, _: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None:
            raise ValueError(
                f"layer {layer} of {type(decoder).__name__} ({type(module).__name__}) gives no attention weights, not even "
                "with eager attention. Choose another layer, or another model."
            )
        kept["attention"] = weights[0][:, queries.to(weights.device)][:, :, places].float().mean(0).cpu()

    with contextlib.ExitStack() as stack:
        stack.enter_context(_eager(decoder))
        hook = decoder.register_forward_pre_hook(keep_features, with_kwargs=True)
        stack.callback(hook.remove)
        stack.callback(decoder.layers[layer].self_attn.register_forward_hook(keep_attention).remove)
        base(**inputs, use_cache=False)
    return kept["attention"].numpy(), kept["features"]


@contextlib.contextmanager
def _eager(decoder: Any) -> Iterator[None]:
    """The decoder with attention that has weights, inside the block.

    Raises:
        ValueError: it has no such.
    """
    before = decoder.config._attn_implementation
    try:
        decoder.set_attn_implementation("eager")
    except ValueError as error:
        raise ValueError(
            f"{type(decoder).__name__} has no eager attention, which alone gives attention weights ({error}). The "
            "alignment cannot be drawn for this model."
        ) from None
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


def _picture(batch: Any, grid: ImageGrid, original: Any, processor: Any) -> Any:
    """What the grid lies over: the vision tower's own pixels, as a picture again, or the whole image."""
    from PIL import Image

    if grid.pixels is None:
        return original.convert("RGB")
    pixels = batch["pixel_values"][grid.pixels].float()
    if grid.size is not None:
        pixels = pixels[:, : grid.size[0], : grid.size[1]]
    settings = processor.image_processor
    if getattr(settings, "do_normalize", True) and getattr(settings, "image_mean", None) is not None:
        mean, deviation = (
            torch.tensor(list(values)).view(3, 1, 1) for values in (settings.image_mean, settings.image_std)
        )
        pixels = pixels * deviation + mean
    shown = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(shown.permute(1, 2, 0).numpy())


def _questions(record: Any) -> list[str]:
    """What is said to the model before each answer."""
    found, said = [], list[str]()
    for message in map(unpacked, record["messages"]):
        text = " ".join(part.get("text") or "" for part in message["content"] if part.get("type") == "text").strip()
        if message["role"] == "assistant":
            found.append(" ".join(said))
            said = []
        elif text:
            said.append(text)
    return found

"""Builds a kind of the zoo, makes its mixed batch, and asks the model itself what it computes without the image.

With transformers' default initialisation the image moves a logit by about 1e-3 and any wrong route passes: the
initialisation is scaled up until Δ is well above the tolerance.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import seecal
from seecal import CALOptions
from seecal.families.table import decoder_of, family_of
from tests.support.builders import Row
from tests.support.zoo_models import ZOO
from tests.support.zoo_parts import PAD, is_answer

MIXED = [
    Row([6, "image", 3, -20]),  # text before the image
    Row([2, "image", 4, "image", 2, -8]),  # two images
    Row([12, -6]),  # text only
    Row([3, "image", -5]),  # a label directly after an image, where no token closes it
]
EARLY = Row([2, -4, "image", 2, -7])  # labels before the image
TEXT_ONLY = [Row([9, -7]), Row([4, -5])]
PADDINGS = ("right", "left")
ROUTES = {
    "drop, packed": CALOptions(padding_free=True),
    "drop, padded": CALOptions(padding_free=False),
    "mask": CALOptions(contrast="mask", padding_free=False),
}


@functools.cache
def _built(name):
    torch.manual_seed(0)
    return scaled(ZOO[name].model(), ZOO[name])


def scaled(model, kind):
    """``model`` with an initialisation under which the image matters, and without dropout."""
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            spread = kind.embed if "embed" in parameter_name else 0.6 / parameter.shape[-1] ** 0.5
            nn.init.normal_(parameter, std=spread)
        elif "gate" in parameter_name and parameter.numel() == 1:
            nn.init.constant_(parameter, 0.8)  # Mllama's gates start closed
        elif not bool(parameter.isfinite().all()):
            nn.init.normal_(parameter, std=0.3)  # some classes leave parameters uninitialised
    head = model.get_output_embeddings().weight
    if head is not model.get_input_embeddings().weight:
        with torch.no_grad():
            head.mul_(kind.head)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def model_of(name, attention="eager"):
    """The model of a kind in eval mode, without gradients. It is built once: leave it as you found it."""
    model = _built(name)
    model.set_attn_implementation(attention)
    assert decoder_of(model).config._attn_implementation == attention
    model.zero_grad()
    return model.eval()


def rows_for(name):
    """The mixed rows; with labels before the image where a row is not one prefix and one answer (PaliGemma)."""
    return MIXED if ZOO[name].per_token is is_answer else [*MIXED, EARLY]


def batch_of(name, rows, padding="right", seed=1):
    """What ``model(**batch)`` takes."""
    kind, generator = ZOO[name], torch.Generator().manual_seed(seed)
    tokens = [_tokens(kind, row, generator) for row in rows]
    length = max(len(ids) for ids, _ in tokens)
    ids, labels = torch.full((len(rows), length), PAD), torch.full((len(rows), length), -100)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, (row_ids, row_labels) in enumerate(tokens):
        at = slice(0, len(row_ids)) if padding == "right" else slice(length - len(row_ids), length)
        ids[index, at], labels[index, at], mask[index, at] = row_ids, row_labels, 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, **kind.per_token(ids, labels)}
    counts = [row.images for row in rows]
    if sum(counts):
        batch |= kind.vision(counts, lambda *shape: torch.randn(*shape, generator=generator))
    if "cross_attention_mask" in batch:
        batch["cross_attention_mask"] = batch["cross_attention_mask"].repeat(1, length, 1, 1)
    return batch


def other_pixels(batch):
    """The same text with other images."""
    return {
        name: value * 1.7 + (value != 0) * 0.3 if name.startswith("pixel_values") else value
        for name, value in batch.items()
    }


def _tokens(kind, row, generator):
    ids, labels = [], []
    for part in row.parts:
        new = kind.image if part == "image" else torch.randint(10, 120, (abs(part),), generator=generator).tolist()
        ids += new
        labels += new if part != "image" and part < 0 else [-100] * len(new)
    return torch.tensor(ids), torch.tensor(labels)


# ---------------------------------------------------------------- the model's own word


@dataclass
class Truth:
    """[N] at every label token, from the model's own full forwards."""

    sample: Tensor
    position: Tensor
    contrast: Tensor
    with_image: Tensor
    without: Tensor

    @property
    def delta(self):
        return torch.where(self.contrast, self.with_image - self.without, 0.0)

    @property
    def tolerance(self):
        return 2e-5 * max(1.0, float(self.delta.abs().max()))


def truth(name, model, batch):
    """What the model gives with the image and, in place of "without", what it gives as the family's definition says.

    Exact families: the image hidden in the 2-D mask. Mllama: no pixels at all.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    image = ids == ZOO[name].placeholder
    with_image, positions = _logits_and_positions(model, batch)
    if family_of(model).cross_attention:
        without, _ = _logits_and_positions(model, _without_vision(name, batch))
        image, hidden = torch.zeros_like(image), image
    else:
        hidden = image
        masked = {**batch, "attention_mask": batch["attention_mask"] * ~image, "position_ids": positions}
        without, _ = _logits_and_positions(model, masked)
    return _at_labels(labels, with_image, without, image, hidden)


def truth_of_short_rows(name, model, batch):
    """Like :func:`truth`, "without" from the model's own forward on each row's text alone, at its original positions."""
    ids, labels = batch["input_ids"], batch["labels"]
    image = ids == ZOO[name].placeholder
    with_image, positions = _logits_and_positions(model, batch)
    without = torch.zeros_like(with_image)
    for row in range(len(ids)):
        (kept,) = (batch["attention_mask"][row].bool() & ~image[row]).nonzero(as_tuple=True)
        short = {
            "input_ids": ids[row : row + 1, kept],
            "attention_mask": torch.ones(1, len(kept), dtype=torch.long),
            "position_ids": positions[..., row : row + 1, kept],
        }
        short |= ZOO[name].per_token(short["input_ids"], labels[row : row + 1, kept])
        without[row, kept] = _logits_and_positions(model, short)[0][0]
    return _at_labels(labels, with_image, without, image, image)


@torch.no_grad()
def _logits_and_positions(model, batch):
    """The model's own logits [B, L, V] and the position ids its decoder was given."""
    seen = {}
    hook = decoder_of(model).register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    try:
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits
    finally:
        hook.remove()
    positions, (rows, length) = seen.get("position_ids"), batch["input_ids"].shape
    positions = torch.arange(length)[None] if positions is None else positions
    return logits, positions.expand(*positions.shape[:-2], rows, length)


def _without_vision(name, batch):
    vision = ZOO[name].vision([1], torch.zeros)
    return {key: value for key, value in batch.items() if key not in vision}


def _at_labels(labels, with_image, without, unseen, image):
    """``unseen`` [B, L]: slots that the pass without the image does not have; ``image``: the placeholders."""
    sample, position = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    position = position + 1
    target, before = labels[sample, position], position - 1
    contrast = ~unseen[sample, before] & (image.cumsum(1)[sample, before] > 0)
    first, second = with_image[sample, before, target], without[sample, before, target]
    return Truth(sample, position, contrast, first, torch.where(contrast, second, first))


def measure(name, attention, padding):
    """({route: what seecal measures}, the model's own word) on the mixed batch."""
    model, batch = model_of(name, attention), batch_of(name, rows_for(name), padding)
    routes = {
        route: seecal.visual_delta(model, batch, contrast=options.contrast, options=options)
        for route, options in ROUTES.items()
        if family_of(model).packs or not options.padding_free
    }
    return routes, truth(name, model, batch)


def drop_difference(name):
    """Worst |drop − the model's own word| / max(1, max|Δ|) over packed and padded rows, attentions and paddings."""
    worst = 0.0
    for attention in ZOO[name].attentions:
        for padding in PADDINGS:
            routes, own = measure(name, attention, padding)
            apart = [float((got.delta - own.delta).abs().max()) for route, got in routes.items() if "drop" in route]
            worst = max(worst, max(apart) / max(1.0, float(own.delta.abs().max())))
    return worst

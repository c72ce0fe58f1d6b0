"""Align the micro VLM's projector: src/seecal/models/micro_projector.safetensors.

Only the projector is trained, on permissively licensed drawings, never on OpenMoji and never on a held-out concept:

    npm pack @iconify-json/noto @iconify-json/noto-v1 @iconify-json/fluent-emoji-flat      # then unpack each
    python scripts/align_projector.py --noto DIR --noto-v1 DIR --fluent DIR --cache DIR [--steps N]

1. features: every drawing is rendered, changed at random several times (place, size, turn, colours, background, drawn
   outlines) and put through the frozen tower once; the features are kept in the cache folder.
2. words: the mean of a drawing's image tokens must tell the words of its name, kind and tags from all other words, by
   SmolLM2's own frozen word table. No language model runs, so that a thousand steps take minutes. The step with the lowest
   loss on drawings kept back is the one that stays.

The features stay in the cache folder, so a second run starts at the second part. Figures are printed at the end,
OpenMoji's among them, by which nothing was chosen.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing as mp
import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from seecal.demo import emoji
from seecal.models import micro
from seecal.models.efficientnet_lite import IMAGE_MEAN, IMAGE_STD

PX, GRID = micro.IMAGE_SIZE, micro.GRID
BATCH = 128
COPIES = 6  # versions of each drawing: the first one unchanged
SIDES = {"left", "right", "rightwards", "leftwards", "back", "end", "soon", "top", "on!"}
COLOURS = {"red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "grey", "pink", "light"}
OUT = Path(micro.__file__).with_name("micro_projector.safetensors")


# ---------------------------------------------------------------- drawings


def vendor_drawings(folder: Path) -> Iterator[tuple[emoji.Emoji, str]]:
    """The emoji of one iconify package that the catalogue knows, as (emoji, SVG)."""
    icons = json.loads((folder / "icons.json").read_text("utf8"))
    chars = json.loads((folder / "chars.json").read_text("utf8"))
    plain = {item.hexcode.replace("-FE0F", ""): item for item in emoji.catalogue()}
    by_name = {emoji.slug(item.name): item for item in emoji.catalogue()}
    by_icon: dict[str, str] = {}
    for code, icon in chars.items():
        by_icon.setdefault(icon, code.upper().replace("-FE0F", ""))
    for icon, body in icons["icons"].items():
        item = plain.get(by_icon[icon]) if icon in by_icon else by_name.get(icon)
        if item is None:
            continue
        width, height = (body.get(side, icons.get(side, 16)) for side in ("width", "height"))
        box = f"{body.get('left', 0)} {body.get('top', 0)} {width} {height}"
        head = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        yield item, f'<svg {head} viewBox="{box}" width="{width}" height="{height}">{body["body"]}</svg>'


def rgba(svg: str, px: int) -> Tensor:
    image = Image.open(io.BytesIO(emoji.render_svg(svg, px, background=None))).convert("RGBA").resize((px, px))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def vary(picture: Tensor, rng: random.Random, words: set[str]) -> Tensor:
    """[4, S, S] RGBA in 0..1 -> [3, PX, PX]: another size, place, turn, colouring and background, outlines at times.

    What the words say stays: no mirror image of a left arrow, no other colour for a red circle.
    """
    colour, alpha = picture[:3], picture[3:]
    if rng.random() < 0.5:  # as pen drawings have it: dark lines around shapes and where colours meet
        width = rng.choice((3, 5, 7))
        grown = F.max_pool2d(alpha[None], width, 1, width // 2)[0]
        light = colour.mean(0, keepdim=True) * alpha
        span = F.max_pool2d(light[None], 3, 1, 1)[0] + F.max_pool2d(-light[None], 3, 1, 1)[0]
        line = torch.maximum(grown - alpha, ((span - 0.12) * 6).clamp(0, 1) * rng.uniform(0.3, 1))
        colour, alpha = colour * (1 - line) + 0.05 * line, grown
    free = not COLOURS & words
    mix = torch.eye(3) + torch.empty(3, 3).normal_(0, 0.12 if free else 0.02, generator=_torch(rng))
    gain = rng.uniform(0.7, 1.25) if free else rng.uniform(0.9, 1.1)
    colour = (torch.einsum("ij,jhw->ihw", mix, colour) * gain + rng.uniform(-0.1, 0.15) * free).clamp(0, 1)
    if free and rng.random() < 0.12:
        colour = colour.mean(0, keepdim=True).expand(3, -1, -1)
    ground = torch.ones(3) if rng.random() < 0.6 else torch.rand(3, generator=_torch(rng)) * 0.5 + 0.5
    turn, size = np.deg2rad(rng.uniform(-14, 14)), rng.uniform(0.85, 1.45)
    stretch = rng.uniform(0.9, 1.1)
    mirror = -1 if not SIDES & words and rng.random() < 0.5 else 1
    cos, sin = float(np.cos(turn)) * size, float(np.sin(turn)) * size
    theta = torch.tensor(
        [[cos * mirror * stretch, -sin, rng.uniform(-0.15, 0.15)], [sin * mirror, cos, rng.uniform(-0.15, 0.15)]]
    )
    grid = F.affine_grid(theta[None], [1, 4, PX, PX], align_corners=False)
    placed = F.grid_sample(torch.cat([colour * alpha, alpha])[None], grid, align_corners=False)[0]
    return placed[:3] + ground[:, None, None] * (1 - placed[3:])


def _torch(rng: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.getrandbits(32))


def on_white(picture: Tensor) -> Tensor:
    colour, alpha = picture[:3], picture[3:]
    return F.interpolate((colour * alpha + 1 - alpha)[None], (PX, PX), mode="bicubic", antialias=True)[0].clamp(0, 1)


# ---------------------------------------------------------------- 1. features


@torch.no_grad()
def drawing_features(tower: nn.Module, drawing: tuple[emoji.Emoji, str]) -> np.ndarray:
    """[COPIES, GRID², 1280] half: the drawing as it is, then its variations, which depend on its name alone."""
    item, svg = drawing
    picture, rng = rgba(svg, 2 * PX), random.Random(item.name + str(len(svg)))
    words = set(item.name.replace("-", " ").lower().split())
    views = [on_white(picture)] + [vary(picture, rng, words) for _ in range(COPIES - 1)]
    pixels = (torch.stack(views) - IMAGE_MEAN) / IMAGE_STD
    return tower(pixels.to(memory_format=torch.channels_last)).last_hidden_state.half().numpy()


def features(folders: dict[str, Path], cache: Path, tower: nn.Module) -> dict:
    """All drawings: vendor and hexcode of each, tokens [drawings, COPIES, GRID², 1280] half. Kept in the cache."""
    path = cache / f"features_{PX}_{GRID}_{COPIES}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    jobs = [(vendor, *pair) for vendor, folder in folders.items() for pair in vendor_drawings(folder)]
    jobs = [job for job in jobs if job[1].split != emoji.HELD_CONCEPT]
    started, rows = time.time(), []
    # One thread each: two processes share a busy machine better than one process with two threads.
    with mp.get_context("fork").Pool(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for at, row in enumerate(pool.imap(partial(drawing_features, tower), [job[1:] for job in jobs], chunksize=8)):
            rows.append(torch.from_numpy(row))
            if at % 400 == 0:
                print(f"features {at}/{len(jobs)} {time.time() - started:.0f} s", flush=True)
    kept = {"vendor": [j[0] for j in jobs], "hexcode": [j[1].hexcode for j in jobs], "tokens": torch.stack(rows)}
    torch.save(kept, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    return kept


@torch.no_grad()
def openmoji_features(cache: Path, tower: nn.Module) -> dict:
    """OpenMoji's drawings through the tower, only to measure on a style that nothing was trained on."""
    path = cache / f"openmoji_{PX}_{GRID}.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    paths = emoji.render_openmoji(emoji.catalogue(), cache / "openmoji")
    rows = []
    for png in paths.values():
        with Image.open(png) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB").resize((PX, PX), Image.Resampling.BICUBIC)))
        rows.append(tower(((pixels.permute(2, 0, 1) / 255 - IMAGE_MEAN) / IMAGE_STD)[None]).last_hidden_state.half())
    kept = {"hexcode": list(paths), "tokens": torch.stack(rows)}
    torch.save(kept, path)
    return kept


# ---------------------------------------------------------------- data both parts share


class Drawings:
    """The features with their emoji, cut into train and val; val holds drawings whose concept other vendors show."""

    def __init__(self, kept: dict, test: dict):
        items = {item.hexcode: item for item in emoji.catalogue()}
        self.tokens, self.items = kept["tokens"], [items[code] for code in kept["hexcode"]]
        drawn: dict[str, int] = {}
        for item in self.items:
            drawn[item.hexcode] = drawn.get(item.hexcode, 0) + 1
        keys = zip(kept["vendor"], kept["hexcode"], strict=True)
        val = [drawn[code] > 1 and random.Random(f"{vendor}:{code}").random() < 0.1 for vendor, code in keys]
        self.train = [at for at, held in enumerate(val) if not held]
        self.val = [at for at, held in enumerate(val) if held]
        self.test_tokens, self.test_items = test["tokens"], [items[code] for code in test["hexcode"]]

    def test(self, *splits: str) -> list[int]:
        return [at for at, item in enumerate(self.test_items) if item.split in splits]


class Projector(nn.Module):
    """LLaVA's projector after a fixed scaling of the features, which :meth:`state` folds into its first layer."""

    def __init__(self, mean: Tensor, std: Tensor, width: int):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.linear_1, self.linear_2 = nn.Linear(len(mean), width), nn.Linear(width, width)

    def forward(self, tokens: Tensor, drop: float = 0.0) -> Tensor:
        x = F.dropout((tokens.float() - self.mean) / self.std, drop, self.training)
        return self.linear_2(F.dropout(F.gelu(self.linear_1(x)), drop, self.training))

    def state(self) -> dict[str, Tensor]:
        weight = self.linear_1.weight / self.std
        bias = self.linear_1.bias - weight @ self.mean
        pairs = {"linear_1.weight": weight, "linear_1.bias": bias}
        pairs |= {"linear_2.weight": self.linear_2.weight, "linear_2.bias": self.linear_2.bias}
        return {name: tensor.detach().half().contiguous() for name, tensor in pairs.items()}


# ---------------------------------------------------------------- 2. words


def word_targets(items: list[emoji.Emoji], tokenizer, index: dict[int, int]) -> Tensor:
    """[len(items), len(index)]: the share of each word piece: the name's most, then the kind's, then the tags'."""
    target = torch.zeros(len(items), len(index))
    for row, item in enumerate(items):
        parts = [(item.name, 1.0), (item.kind.removeprefix("a ").removeprefix("an "), 0.4), (" ".join(item.tags), 0.4)]
        for text, weight in parts:
            ids = [index[i] for i in pieces(text, tokenizer) if i in index]
            for i in ids:
                target[row, i] += weight / len(ids)
    return target / target.sum(1, keepdim=True)


def pieces(text: str, tokenizer) -> list[int]:
    return tokenizer(" " + text, add_special_tokens=False).input_ids if text else []


class Words:
    """What the mean of a drawing's image tokens says: logits over word pieces, by the language model's word table."""

    def __init__(self, items: list[emoji.Emoji], table: Tensor, tokenizer):
        texts = [text for item in items for text in (item.name, item.kind, *item.tags)]
        found = sorted({i for text in texts for i in pieces(text, tokenizer)})
        self.index, self.tokenizer = {token: at for at, token in enumerate(found)}, tokenizer
        words = table[found]
        self.centre, self.size = words.mean(0), words.norm(dim=1).mean()
        self.words = (words - self.centre) / self.size
        self.log_scale, self.bias = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.zeros(len(found)))

    def logits(self, z: Tensor) -> Tensor:
        """Image tokens [B, T, D] -> [B, words]."""
        return (z.mean(1) - self.centre) / self.size @ self.words.T * self.log_scale.exp() + self.bias

    @torch.no_grad()
    def figures(self, projector: Projector, tokens: Tensor, items: list[emoji.Emoji], known: list[emoji.Emoji]) -> str:
        """Which name, of all those of ``known``, has the likeliest pieces on average: share right, and among five."""
        projector.eval()
        logprob = self.logits(projector(tokens)).log_softmax(-1)
        projector.train()
        names = [[self.index[i] for i in pieces(item.name, self.tokenizer)] for item in known]
        best = torch.stack([logprob[:, ids].mean(1) for ids in names], 1).topk(5).indices
        right = best == torch.tensor([known.index(item) for item in items])[:, None]
        shares = f"{right[:, 0].float().mean():.1%}, among the first five {right.any(1).float().mean():.1%}"
        return f"name right {shares} (of {len(known)} names, n={len(items)})"


def train_words(data: Drawings, projector: Projector, words: Words, steps: int) -> None:
    """Trains the projector in place; it ends as it was where the loss on the drawings kept back was lowest."""
    targets = word_targets(data.items, words.tokenizer, words.index)
    optimizer = torch.optim.AdamW([*projector.parameters(), words.log_scale, words.bias], lr=2e-3, weight_decay=0.05)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=50)
    cool = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    rows, best = torch.tensor(data.train), (float("inf"), {})
    for step in range(1, steps + 1):
        at = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        copy = torch.randint(COPIES, (BATCH,), generator=generator)
        tokens, wanted = data.tokens[at, copy].float(), targets[at]
        share = (
            torch.rand(BATCH, generator=generator).pow(2)[:, None] / 2
        )  # mixed with another drawing, mostly a little
        tokens = torch.lerp(tokens, tokens.roll(1, 0), share[..., None])
        wanted = torch.lerp(wanted, wanted.roll(1, 0), share)
        z = projector(tokens, drop=0.5)
        loss = -(wanted * words.logits(z).log_softmax(-1)).sum(1).mean()
        # as long as words, so that the language model is not given anything out of its range
        loss = loss + 0.1 * (z.norm(dim=-1) / words.size - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for schedule in (warm, cool):
            schedule.step()
        if step % 100 == 0:
            now = kept_back_loss(data, projector, words, targets)
            if now < best[0]:
                best = (now, {name: value.clone() for name, value in projector.state_dict().items()})
            print(f"step {step} loss {loss.item():.3f}, on drawings kept back {now:.3f}", flush=True)
    projector.load_state_dict(best[1])


@torch.no_grad()
def kept_back_loss(data: Drawings, projector: Projector, words: Words, targets: Tensor) -> float:
    projector.eval()
    found = words.logits(projector(data.tokens[data.val, 0])).log_softmax(-1)
    projector.train()
    return -(targets[data.val] * found).sum(1).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for vendor in ("noto", "noto-v1", "fluent"):
        parser.add_argument(f"--{vendor}", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200, help=f"of {BATCH} drawings")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    model, processor = micro.build(projector=None)
    tower, tokenizer = model.model.vision_tower, processor.tokenizer
    folders = {"noto": args.noto, "noto-v1": args.noto_v1, "fluent": args.fluent}
    data = Drawings(features(folders, args.cache, tower), openmoji_features(args.cache, tower))
    print(f"{len(data.train)} drawings to train on, {len(data.val)} kept back, {COPIES} versions each", flush=True)
    flat = data.tokens[data.train[:1000]].float().flatten(0, 2)
    projector = Projector(flat.mean(0), flat.std(0) + 0.05, model.config.text_config.hidden_size)
    # Only the words of concepts that were drawn for training: the held-out ones are not even among the wrong answers.
    words = Words(data.items, model.get_input_embeddings().weight.detach(), tokenizer)
    train_words(data, projector, words, args.steps)
    save_file(projector.state(), OUT)
    print(f"{OUT.stat().st_size / 1e6:.1f} MB -> {OUT}", flush=True)
    known = [*dict.fromkeys(data.items)]
    train, val, test = data.train[:1000], data.val, data.test(emoji.TRAIN, emoji.HELD_IMAGE)
    test = [at for at in test if data.test_items[at] in known]
    for label, tokens, items in (
        ("trained on", data.tokens[train, 0], [data.items[at] for at in train]),
        ("kept back", data.tokens[val, 0], [data.items[at] for at in val]),
        ("OpenMoji", data.test_tokens[test, 0], [data.test_items[at] for at in test]),
    ):
        print(f"{label}: {words.figures(projector, tokens, items, known)}", flush=True)


if __name__ == "__main__":
    main()

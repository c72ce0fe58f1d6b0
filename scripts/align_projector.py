"""Align the micro VLM's projector: src/seecal/models/micro_projector.safetensors.

Only the projector is trained, on permissively licensed drawings, never on OpenMoji and never on a held-out concept:

    npm pack @iconify-json/noto @iconify-json/noto-v1 @iconify-json/fluent-emoji-flat      # then unpack each
    python scripts/align_projector.py --noto DIR --noto-v1 DIR --fluent DIR --cache DIR [--llm-minutes M]

1. features: every drawing is rendered, changed at random several times (place, size, turn, colours, background, drawn
   outlines) and put through the frozen tower once; the features are kept in the cache folder.
2. words: the image tokens' mean must name the words of the caption among all words, against SmolLM2's own frozen word
   table. No language model runs, so thousands of steps take minutes; the best step on drawings never trained on is kept.
3. llm: the same projector learns to make the frozen language model answer.

Interrupt it whenever you like: every part goes on from what is in the cache folder. The figures go to the end of the log.
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

from seecal.data import emoji
from seecal.models import micro
from seecal.models.efficientnet_lite import IMAGE_MEAN, IMAGE_STD

PX, GRID = micro.IMAGE_SIZE, micro.GRID
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


def name_accuracy(mean_logits: Tensor, items: list[emoji.Emoji], names: list[list[int]], own: list[int]) -> str:
    """Which of all names has the likeliest pieces on average: share right, and right among the first five."""
    logprob = mean_logits.log_softmax(-1)
    score = torch.stack([logprob[:, ids].mean(1) for ids in names], 1)
    best = score.topk(5).indices
    right = best == torch.tensor(own)[:, None]
    return f"{right[:, 0].float().mean():.1%} (top 5 {right.any(1).float().mean():.1%}, n={len(items)})"


def train_words(data: Drawings, projector: Projector, table: Tensor, tokenizer, minutes: float, cache: Path) -> None:
    all_items = [*dict.fromkeys(data.items + data.test_items)]
    texts = [text for item in all_items for text in (item.name, item.kind, *item.tags)]
    index = {token: at for at, token in enumerate(sorted({i for text in texts for i in pieces(text, tokenizer)}))}
    words = table[sorted(index)]
    centre, size = words.mean(0), words.norm(dim=1).mean()
    words = words - centre
    targets = word_targets(data.items, tokenizer, index)
    log_scale = nn.Parameter(torch.tensor(3.0))
    bias = nn.Parameter(torch.zeros(len(index)))
    names = [[index[i] for i in pieces(item.name, tokenizer)] for item in all_items]
    place = {item: at for at, item in enumerate(all_items)}

    def logits(tokens: Tensor, drop: float = 0.0) -> tuple[Tensor, Tensor]:
        z = projector(tokens, drop)
        pooled = z.mean(1) - centre
        return pooled / size @ words.T / size * log_scale.exp() + bias, z

    def measure(tokens: Tensor, items: list[emoji.Emoji]) -> str:
        projector.eval()
        with torch.no_grad():
            text = name_accuracy(logits(tokens)[0], items, names, [place[item] for item in items])
        projector.train()
        return text

    def val_loss() -> float:
        projector.eval()
        with torch.no_grad():
            found, _ = logits(data.tokens[data.val, 0])
        projector.train()
        return float(-(targets[data.val] * found.log_softmax(-1)).sum(1).mean())

    optimizer = torch.optim.AdamW([*projector.parameters(), log_scale, bias], lr=1e-3, weight_decay=0.05)
    best, started, step, batch, total = (float("inf"), {}), time.time(), 0, 128, minutes * 60
    rows = torch.tensor(data.train)
    generator = torch.Generator().manual_seed(0)
    while (spent := time.time() - started) < total:
        for group in optimizer.param_groups:  # cosine over the time there is, after a short warm-up
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (0.5 + 0.5 * float(np.cos(np.pi * spent / total)))
        at = rows[torch.randint(len(rows), (batch,), generator=generator)]
        copy = torch.randint(COPIES, (batch,), generator=generator)
        tokens, wanted = data.tokens[at, copy].float(), targets[at]
        share = torch.rand(batch, generator=generator).pow(2)[:, None]  # mixed with another drawing, mostly a little
        tokens = torch.lerp(tokens, tokens.roll(1, 0), share[..., None] / 2)
        wanted = torch.lerp(wanted, wanted.roll(1, 0), share / 2)
        found, z = logits(tokens, drop=0.5)
        loss = -(wanted * found.log_softmax(-1)).sum(1).mean()
        loss = loss + 0.1 * (z.norm(dim=-1) / size - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 100 == 0:
            now = val_loss()
            if now < best[0]:
                best = (now, {name: value.clone() for name, value in projector.state_dict().items()})
            if step % 200 == 0:
                names_right = measure(data.tokens[data.val, 0], [data.items[i] for i in data.val])
                print(f"words step {step} loss {loss:.3f} val {now:.3f} names {names_right}", flush=True)

    projector.load_state_dict(best[1])
    torch.save(best[1], cache / "words.pt")
    for label, chosen in {
        "train": (data.tokens[data.train[:1000], 0], [data.items[i] for i in data.train[:1000]]),
        "val": (data.tokens[data.val, 0], [data.items[i] for i in data.val]),
        **{
            f"OpenMoji {split}": (data.test_tokens[data.test(split), 0], [data.test_items[i] for i in data.test(split)])
            for split in (emoji.TRAIN, emoji.HELD_IMAGE, emoji.HELD_CONCEPT)
        },
    }.items():
        print(f"words, {label}: name among {len(names)} {measure(*chosen)}", flush=True)


# ---------------------------------------------------------------- 3. llm


def sample(item: emoji.Emoji, tokenizer, rng: random.Random, question: str) -> tuple[list[int], list, list]:
    """(ids, loss weight per id, is it a word of the image): the chat around one image; -1 stands for an image token."""
    reply = emoji.answer(item, question, rng)
    encode = partial(tokenizer, add_special_tokens=False)
    before = encode("<|im_start|>user\n").input_ids
    after = encode(f"\n{reply.question}<|im_end|>\n<|im_start|>assistant\n").input_ids
    ids = before + [-1] * GRID**2 + after
    weights, visual = [0.0] * len(ids), [False] * len(ids)
    text, spans = reply.text + "<|im_end|>", []
    for piece, seen in reply.pieces:
        spans += [seen] * len(piece)
    encoded = encode(text, return_offsets_mapping=True)
    for token, (start, _) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
        # the first letter decides; a leading space belongs to the word after it
        at = start + 1 if text[start] == " " and start + 1 < len(text) else start
        seen = spans[at] if at < len(spans) else False
        ids.append(token)
        weights.append(1.0 if seen else 0.1)
        visual.append(seen)
    return ids, weights, visual


def run_llm(
    model, projector: Projector, tokens: Tensor, samples: list, drop: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(cross-entropy, weight, is a word) of every answer token of a batch; the language model in bfloat16."""
    longest = max(len(ids) for ids, _, _ in samples)
    grid = torch.zeros(len(samples), longest, dtype=torch.long)
    mask, weight, visual = torch.zeros_like(grid), torch.zeros(len(samples), longest), torch.zeros_like(grid).bool()
    for row, (ids, weights, seen) in enumerate(samples):
        grid[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
        weight[row, : len(ids)], visual[row, : len(ids)] = torch.tensor(weights), torch.tensor(seen)
    image = grid == -1
    with torch.autocast("cpu", torch.bfloat16):
        embedded = model.get_input_embeddings()(grid.clamp(min=0))
        embedded = embedded.masked_scatter(
            image[..., None].expand_as(embedded), projector(tokens, drop).to(embedded.dtype)
        )
        hidden = model.model.language_model(inputs_embeds=embedded, attention_mask=mask, use_cache=False)[0]
        keep = weight[:, 1:] > 0
        logits = model.lm_head(hidden[:, :-1][keep]).float()
    return F.cross_entropy(logits, grid[:, 1:][keep], reduction="none"), weight[:, 1:][keep], visual[:, 1:][keep]


@torch.no_grad()
def word_nll(model, projector: Projector, tokens: Tensor, items: list[emoji.Emoji], tokenizer, question: str) -> float:
    """Nats per word token of the image in the answers to one question."""
    projector.eval()
    total, count = 0.0, 0
    for at in range(0, len(items), 64):
        rng = random.Random(at)
        samples = [sample(item, tokenizer, rng, question) for item in items[at : at + 64]]
        loss, _, visual = run_llm(model, projector, tokens[at : at + 64], samples)
        total, count = total + float(loss[visual].sum()), count + int(visual.sum())
    projector.train()
    return total / count


@torch.no_grad()
def exact_names(model, projector: Projector, tokens: Tensor, items: list[emoji.Emoji], tokenizer) -> float:
    """Share of drawings named exactly: every token of the name, and the end after it, is the likeliest."""
    projector.eval()
    right = 0
    for at in range(0, len(items), 64):
        rng = random.Random(0)
        samples = [sample(item, tokenizer, rng, "name") for item in items[at : at + 64]]
        loss_free = greedy_right(model, projector, tokens[at : at + 64], samples)
        right += sum(loss_free)
    projector.train()
    return right / len(items)


def greedy_right(model, projector: Projector, tokens: Tensor, samples: list) -> list[bool]:
    longest = max(len(ids) for ids, _, _ in samples)
    grid = torch.zeros(len(samples), longest, dtype=torch.long)
    mask, asked = torch.zeros_like(grid), torch.zeros_like(grid).bool()
    for row, (ids, weights, _) in enumerate(samples):
        grid[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
        asked[row, : len(ids)] = torch.tensor(weights) > 0
    with torch.autocast("cpu", torch.bfloat16):
        embedded = model.get_input_embeddings()(grid.clamp(min=0))
        image = (grid == -1)[..., None].expand_as(embedded)
        embedded = embedded.masked_scatter(image, projector(tokens).to(embedded.dtype))
        hidden = model.model.language_model(inputs_embeds=embedded, attention_mask=mask, use_cache=False)[0]
        best = torch.zeros_like(grid)
        keep = asked[:, 1:]
        best[:, 1:][keep] = model.lm_head(hidden[:, :-1][keep]).argmax(-1)
    return [bool((best[row] == grid[row])[asked[row]].all()) for row in range(len(samples))]


def train_llm(data: Drawings, projector: Projector, model, tokenizer, minutes: float, cache: Path) -> None:
    model.requires_grad_(False)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, weight_decay=0.05)
    rng, started, step, total, done = random.Random(1), time.time(), 0, minutes * 60, 0.0
    saved, best = cache / "llm.pt", (float("inf"), {})
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        projector.load_state_dict(state["projector"])
        optimizer.load_state_dict(state["optimizer"])
        step, done, best = state["step"], state["seconds"], (state["best"], state["best_projector"])
    while (spent := done + time.time() - started) < total:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 30) * (0.5 + 0.5 * float(np.cos(np.pi * spent / total)))
        # One long answer would pad a whole batch of short ones, so each batch is of one kind of question.
        question, size = rng.choices((("name", 64), ("kind", 64), ("describe", 32)), (6, 2, 1))[0]
        at = [rng.choice(data.train) for _ in range(size)]
        tokens = torch.stack([data.tokens[i, rng.randrange(COPIES)] for i in at])
        samples = [sample(data.items[i], tokenizer, rng, question) for i in at]
        loss, weight, _ = run_llm(model, projector, tokens, samples, drop=0.2)
        total_loss = (loss * weight).sum() / weight.sum()
        optimizer.zero_grad()
        total_loss.backward()
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            now = word_nll(
                model,
                projector,
                data.tokens[data.val, 0][:192],
                [data.items[i] for i in data.val[:192]],
                tokenizer,
                "name",
            )
            if now < best[0]:
                best = (now, {name: value.clone() for name, value in projector.state_dict().items()})
            state = {"projector": projector.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            state |= {"seconds": done + time.time() - started, "best": best[0], "best_projector": best[1]}
            torch.save(state, saved.with_suffix(".part"))
            saved.with_suffix(".part").rename(saved)
            print(f"llm step {step} {spent:.0f} s loss {total_loss.item():.3f} val word NLL {now:.3f}", flush=True)
    projector.load_state_dict(best[1])
    parts = {"val": (data.tokens[data.val, 0], [data.items[i] for i in data.val])}
    for split in (emoji.HELD_IMAGE, emoji.HELD_CONCEPT):
        rows = data.test(split)
        parts[f"OpenMoji {split}"] = (data.test_tokens[rows], [data.test_items[i] for i in rows])
    for label, (tokens, items) in parts.items():
        figures = [f"{q} {word_nll(model, projector, tokens, items, tokenizer, q):.3f}" for q in ("name", "kind")]
        exact = exact_names(model, projector, tokens, items, tokenizer)
        print(f"llm, {label}: word NLL {', '.join(figures)}; exact names {exact:.1%} (n={len(items)})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for vendor in ("noto", "noto-v1", "fluent"):
        parser.add_argument(f"--{vendor}", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--words-minutes", type=float, default=3)
    parser.add_argument("--llm-minutes", type=float, default=25)
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
    if (args.cache / "words.pt").exists():
        projector.load_state_dict(torch.load(args.cache / "words.pt", weights_only=True))
    else:
        table = model.get_input_embeddings().weight.detach()
        train_words(data, projector, table, tokenizer, args.words_minutes, args.cache)
    train_llm(data, projector, model, tokenizer, args.llm_minutes, args.cache)
    save_file(projector.state(), OUT)
    print(f"{OUT.stat().st_size / 1e6:.1f} MB -> {OUT}")


if __name__ == "__main__":
    main()

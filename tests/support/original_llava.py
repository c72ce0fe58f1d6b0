"""Tiny checkpoints in the layout of the original LLaVA code, and its forward written out in plain torch."""

import json
import math

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from tests.support import processors

SIDE, PATCH, VISION, WIDTH, HEADS = 32, 8, 16, 32, 4
# (width, height), as the original has it
GRID = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]
TOWER = "model.vision_tower.vision_tower.vision_model."


def state_dict(kind, rows, seed=0):
    """Random tensors by their original names."""
    draw = torch.Generator().manual_seed(seed)

    def some(*shape, around=0.0):
        return around + 0.3 * torch.randn(*shape, generator=draw)

    def norm(name, width, bias=True):
        found = {f"{name}.weight": some(width, around=1.0)}
        return {**found, f"{name}.bias": some(width)} if bias else found

    def linear(name, out, into, bias=True):
        found = {f"{name}.weight": some(out, into)}
        return {**found, f"{name}.bias": some(out)} if bias else found

    found = {"model.embed_tokens.weight": some(rows, WIDTH), "lm_head.weight": some(rows, WIDTH)}
    for i in range(2):
        at = f"model.layers.{i}"
        for name in "qkvo":
            found |= linear(f"{at}.self_attn.{name}_proj", WIDTH, WIDTH, bias=False)
        found |= linear(f"{at}.mlp.gate_proj", 48, WIDTH, bias=False) | linear(
            f"{at}.mlp.up_proj", 48, WIDTH, bias=False
        )
        found |= linear(f"{at}.mlp.down_proj", WIDTH, 48, bias=False)
        found |= norm(f"{at}.input_layernorm", WIDTH, bias=False)
        found |= norm(f"{at}.post_attention_layernorm", WIDTH, bias=False)
    found |= norm("model.norm", WIDTH, bias=False)
    found |= linear("model.mm_projector.0", WIDTH, VISION) | linear("model.mm_projector.2", WIDTH, WIDTH)
    if kind == "llava_next":
        found["model.image_newline"] = some(WIDTH)
    return found | {TOWER + name: one for name, one in tower(some, norm, linear).items()}


def tower(some, norm, linear):
    found = {
        "embeddings.class_embedding": some(VISION),
        "embeddings.patch_embedding.weight": some(VISION, 3, PATCH, PATCH),
        "embeddings.position_embedding.weight": some((SIDE // PATCH) ** 2 + 1, VISION),
    }
    found |= norm("pre_layrnorm", VISION) | norm("post_layernorm", VISION)
    for i in range(3):
        at = f"encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= linear(f"{at}.self_attn.{name}", VISION, VISION)
        found |= linear(f"{at}.mlp.fc1", 24, VISION) | linear(f"{at}.mlp.fc2", VISION, 24)
        found |= norm(f"{at}.layer_norm1", VISION) | norm(f"{at}.layer_norm2", VISION)
    return found


def config(kind, rows):
    found = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "vocab_size": rows,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "bos_token_id": 283,
        "eos_token_id": 284,
        "pad_token_id": 0,
        "torch_dtype": "float32",
        "use_cache": True,
        "mm_vision_tower": "authors/clip",
        "mm_hidden_size": VISION,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 384,
        "use_mm_proj": True,
        "mm_projector_lr": None,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
    }
    if kind == "llava_next":
        anyres = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": GRID, "mm_patch_merge_type": "spatial_unpad"}
        found |= anyres
    return found


def tokenizer():
    """Of a language model that knows no images: 285 tokens and no padding of its own."""
    return processors.tokenizer(pad=None, bos="<s>", eos="</s>", begins=True)


def clip_folder(folder, state=None):
    """The tower's folder, as CLIP's is published: config.json, and its tensors under ``vision_model.``."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": VISION, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", **sizes, "image_size": SIDE, "patch_size": PATCH, "projection_dim": 8}
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    held = {f"vision_model.{n.removeprefix(TOWER)}": t for n, t in (state or {}).items() if n.startswith(TOWER)}
    held["text_model.final_layer_norm.weight"] = torch.ones(4)
    save_file(held, folder / "model.safetensors")
    return folder


def checkpoint(folder, kind, *, files="safetensors", without=(), seed=0, **changes):
    """(state dict, config) of a checkpoint that is written into ``folder``.

    ``files``: "safetensors", "bin", each in one file, or "… shards" (two, with an index), or "… loose" (two without one).
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizer()
    made.save_pretrained(folder)
    state = {n: t for n, t in state_dict(kind, len(made), seed).items() if not n.startswith(tuple(without))}
    settings = {**config(kind, len(made)), **changes}
    (folder / "config.json").write_text(json.dumps(settings))
    write(folder, state, files)
    return state, settings


def write(folder, state, files):
    kind, _, how = files.partition(" ")
    save = save_file if kind == "safetensors" else torch.save
    stem, end = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    if not how:
        save(dict(state), folder / f"{stem}.{end}")
        return
    names, index = sorted(state), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-0000{i}-of-00002.{end}"
        save({name: state[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    if how == "shards":
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


# ---------------------------------------------------------------- the original's forward, in float64


def logits(state, ids, tiles=None, size=None):
    """Logits [L, V] of one row of ids, -200 for its image.

    ``tiles`` [n, 3, S, S]: the image, or for LLaVA-NeXT the whole image and its tiles; ``size``: its (width, height).
    """
    w = {name: tensor.double() for name, tensor in state.items()}
    parts = []
    for one in ids:
        parts.append(
            image_features(w, tiles.double(), size) if one == -200 else w["model.embed_tokens.weight"][one][None]
        )
    return _llama(w, torch.cat(parts)) @ w["lm_head.weight"].T


def image_features(w, tiles, size):
    seen = _clip(w, tiles)
    seen = F.gelu(_linear(w, "model.mm_projector.0", seen))
    seen = _linear(w, "model.mm_projector.2", seen)
    if size is None:
        return seen[0]
    side = SIDE // PATCH
    wide, high = (pixels // SIDE for pixels in select_best_resolution(size, GRID))
    grid = seen[1:].view(high, wide, side, side, -1).permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
    grid = _unpad(grid, size)
    newline = w["model.image_newline"][:, None, None].expand(*grid.shape[:-1], 1)
    return torch.cat([seen[0], torch.cat([grid, newline], -1).flatten(1, 2).T])


def select_best_resolution(size, grid):
    """The original's choice of tiles, all in (width, height)."""
    best, most, least_wasted = None, 0, math.inf
    for wide, high in grid:
        scale = min(wide / size[0], high / size[1])
        used = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        wasted = wide * high - used
        if used > most or (used == most and wasted < least_wasted):
            best, most, least_wasted = (wide, high), used, wasted
    return best


def _unpad(grid, size):
    high, wide = grid.shape[1:]
    if size[0] / size[1] > wide / high:
        left = (high - int(size[1] * (wide / size[0]))) // 2
        return grid[:, left : high - left]
    left = (wide - int(size[0] * (high / size[1]))) // 2
    return grid[:, :, left : wide - left]


def _linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def _norm(w, name, x):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)


def _clip(w, pixels):
    """Patch features of the layer before the last."""
    x = F.conv2d(pixels, w[TOWER + "embeddings.patch_embedding.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([w[TOWER + "embeddings.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = _norm(w, TOWER + "pre_layrnorm", x + w[TOWER + "embeddings.position_embedding.weight"])
    for i in range(2):
        at = f"{TOWER}encoder.layers.{i}"
        y = _norm(w, f"{at}.layer_norm1", x)
        q, k, v = (_heads(_linear(w, f"{at}.self_attn.{one}_proj", y), 2) for one in "qkv")
        x = x + _linear(w, f"{at}.self_attn.out_proj", _attend(q, k, v))
        y = _linear(w, f"{at}.mlp.fc1", _norm(w, f"{at}.layer_norm2", x))
        x = x + _linear(w, f"{at}.mlp.fc2", y * torch.sigmoid(1.702 * y))
    return x[:, 1:]


def _heads(x, heads):
    return x.view(*x.shape[:-1], heads, -1).transpose(-3, -2)


def _attend(q, k, v, mask=0.0):
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask, -1)
    return (weights @ v).transpose(-3, -2).flatten(-2)


def _rms(w, name, x):
    single = x.float()  # whatever the model's precision, as in transformers' Llama, which the original calls
    return (single * torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * w[f"{name}.weight"]


def _turned(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _llama(w, x):
    head = WIDTH // HEADS
    angle = torch.arange(len(x)).float()[:, None] * (1.0 / 10000.0 ** (torch.arange(0, head, 2).float() / head))
    cos, sin = (torch.cat([one, one], -1).double() for one in (angle.cos(), angle.sin()))  # single, too
    mask = torch.full((len(x), len(x)), -math.inf, dtype=torch.double).triu(1)
    for i in range(2):
        at = f"model.layers.{i}"
        y = _rms(w, f"{at}.input_layernorm", x)
        q, k, v = (_heads(_linear(w, f"{at}.self_attn.{one}_proj", y), HEADS) for one in "qkv")
        x = x + _linear(w, f"{at}.self_attn.o_proj", _attend(_turned(q, cos, sin), _turned(k, cos, sin), v, mask))
        y = _rms(w, f"{at}.post_attention_layernorm", x)
        y = F.silu(_linear(w, f"{at}.mlp.gate_proj", y)) * _linear(w, f"{at}.mlp.up_proj", y)
        x = x + _linear(w, f"{at}.mlp.down_proj", y)
    return _rms(w, "model.norm", x)

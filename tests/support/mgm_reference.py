"""Mini-Gemini once more, straightforward: the forward of the original's checkpoints, by their own names of tensors.

Token after token and cell after cell, with nothing of seecal in it. ``state`` is what the original saves (MGM-7B's layout,
or MGM-2B's with Gemma), towers included; all is computed in the precision of its tensors. Equations and orders: MGM's
``mgm/model/mgm_arch.py`` (``unified_resampler``, ``encode_images``), timm's ConvNeXt, CLIP's vision transformer.
"""

import math

import torch
import transformers as T
from torch.nn import functional as F


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state, name, x, eps):
    mean = x.mean(-1, keepdim=True)
    spread = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (spread + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def resized(x, side):
    return F.interpolate(x[None], (side, side), mode="bilinear", align_corners=False)[0]


# ---- towers ----


def clip_tokens(state, picture, heads, layer=-2):
    """[S², C] of a picture [3, s, s]: a layer's output without the class token."""
    name = "model.vision_tower.vision_tower.vision_model"
    kernel = state[f"{name}.embeddings.patch_embedding.weight"]
    patches = F.conv2d(picture[None], kernel, stride=kernel.shape[-1])[0].flatten(1).T
    x = torch.cat([state[f"{name}.embeddings.class_embedding"][None], patches])
    x = norm(state, f"{name}.pre_layrnorm", x + state[f"{name}.embeddings.position_embedding.weight"], 1e-5)
    states = [x]
    while f"{name}.encoder.layers.{len(states) - 1}.layer_norm1.weight" in state:
        one = f"{name}.encoder.layers.{len(states) - 1}"
        normed = norm(state, f"{one}.layer_norm1", x, 1e-5)
        q, k, v = (linear(state, f"{one}.self_attn.{part}_proj", normed) for part in "qkv")
        width = q.shape[-1] // heads
        found = []
        for head in range(heads):
            at = slice(head * width, (head + 1) * width)
            found.append((q[:, at] @ k[:, at].T / math.sqrt(width)).softmax(-1) @ v[:, at])
        x = x + linear(state, f"{one}.self_attn.out_proj", torch.cat(found, -1))
        inner = linear(state, f"{one}.mlp.fc1", norm(state, f"{one}.layer_norm2", x, 1e-5))
        x = x + linear(state, f"{one}.mlp.fc2", inner * torch.sigmoid(1.702 * inner))  # CLIP's quick GELU
        states.append(x)
    return states[layer][1:]


def convnext_map(state, picture):
    """[A, H, H] of a picture [3, S, S]: the four stages' outputs in the first one's size, on top of each other."""
    name = "model.vision_tower_aux"

    def over_channels(which, x):
        return norm(state, which, x.permute(1, 2, 0), 1e-6).permute(2, 0, 1)

    def conv(which, x, **options):
        return F.conv2d(x[None], state[f"{which}.weight"], state[f"{which}.bias"], **options)[0]

    x = over_channels(f"{name}.vision_stem.1", conv(f"{name}.vision_stem.0", picture, stride=4))
    stages = []
    for stage in range(4):
        at = f"{name}.vision_stages.{stage}"
        if stage:
            x = conv(f"{at}.downsample.1", over_channels(f"{at}.downsample.0", x), stride=2)
        block = 0
        while f"{at}.blocks.{block}.gamma" in state:
            one = f"{at}.blocks.{block}"
            y = conv(f"{one}.conv_dw", x, padding=3, groups=len(x)).permute(1, 2, 0)
            y = F.gelu(linear(state, f"{one}.mlp.fc1", norm(state, f"{one}.norm", y, 1e-6)))
            x = x + (state[f"{one}.gamma"] * linear(state, f"{one}.mlp.fc2", y)).permute(2, 0, 1)
            block += 1
        stages.append(x)
    return torch.cat([stages[0], *(resized(stage, stages[0].shape[-1]) for stage in stages[1:])])


# ---- patch info mining ----


def mined(state, tokens, cells):
    """x_n + e_n for tokens [S², C] over the cells [A, H, H], one token after the other."""
    side = math.isqrt(len(tokens))
    window = cells.shape[-1] // side
    out = []
    for number, token in enumerate(tokens):
        row, column = divmod(number, side)
        own = cells[:, row * window : (row + 1) * window, column * window : (column + 1) * window]
        own = own.flatten(1).T  # [M², A]
        query, key, value = (f"model.vlm_uni_{part}_projector" for part in ("query", "aux", "val"))
        q = linear(state, f"{query}.1", norm(state, f"{query}.0", token, 1e-5))
        k = linear(state, f"{key}.1", norm(state, f"{key}.0", own, 1e-5))
        v = linear(state, f"{value}.1", norm(state, f"{value}.0", own, 1e-5))
        out.append(token + (k @ q / math.sqrt(len(q))).softmax(0) @ v)
    return torch.stack(out)


def image_features(state, pictures, large, *, heads, grid=1):
    """[N, D] of one image: low-resolution ``pictures`` (with a grid its tiles row by row, then the whole) and the ``large``
    one [3, S, S]. The whole picture's tokens come first."""
    cells = convnext_map(state, large)
    if grid == 1:
        parts = [(pictures[0], cells)]
    else:
        side = cells.shape[-1] // grid
        parts = [(pictures[-1], resized(cells, side))]
        for number in range(grid * grid):
            row, column = divmod(number, grid)
            own = cells[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
            parts.append((pictures[number], own))
    tokens = torch.cat([mined(state, clip_tokens(state, picture, heads), own) for picture, own in parts])
    inner = F.gelu(linear(state, "model.mm_projector.0", tokens))
    return linear(state, "model.mm_projector.2", inner)


# ---- the whole model ----


def language_model(state, config):
    """transformers' own decoder with the weights of the state."""
    names = ("model.embed_tokens.", "model.layers.", "model.norm.")
    own = {name.removeprefix("model."): one for name, one in state.items() if name.startswith(names)}
    decoder = T.AutoModel.from_config(config, dtype=own["norm.weight"].dtype)
    decoder.load_state_dict(own)
    return decoder.eval()


def logits(state, text_config, ids, images, *, heads, image_id, grid=1):
    """[L, V] of one row of ids, in which one ``image_id`` stands for each of the ``images``, (pictures, large) pairs."""
    decoder = language_model(state, text_config)
    images, parts = list(images), []
    for token in ids.tolist():
        if token == image_id:
            parts.append(image_features(state, *images.pop(0), heads=heads, grid=grid))
        else:
            parts.append(state["model.embed_tokens.weight"][token][None])
    embeds = torch.cat(parts)
    if text_config.model_type == "gemma":  # when MGM-2B was trained, Gemma multiplied whatever it was given
        embeds = embeds * math.sqrt(embeds.shape[-1])
    with torch.no_grad():
        hidden = decoder(inputs_embeds=embeds[None]).last_hidden_state[0]
    head = state.get("lm_head.weight", state["model.embed_tokens.weight"])
    return hidden @ head.T

"""What a LLaVA is put together of beside its weights: two tokens more, a padded vocabulary, and a processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.image_placement import PLACEHOLDER

PAD = "<pad>"
# Rows of the vocabulary come in multiples of this, as in the published checkpoints: 32000 and two tokens are 32064
MULTIPLE = 64
# Sides of the grids of tiles by sides of the tower, (height, width). The released code has them as (width, height) in the
# order (1, 2), (2, 1), (2, 2), (3, 1), (1, 3), and the first of two that are equally good wins: this list, and not the same
# numbers read the other way round, chooses its tiles (tests/models/convert/test_grids.py).
GRIDS = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def grid_pinpoints(side: int) -> list[list[int]]:
    """The sizes (height, width) in pixels that images are cut into tiles at, for a tower that sees squares of ``side``."""
    return [[rows * side, columns * side] for rows, columns in GRIDS]


def tokenizer_of(folder: str, **options: Any) -> Any:
    """A language model's tokenizer, from its folder or hub id. ValueError in one line if there is none."""
    from transformers import AutoTokenizer

    local = {"local_files_only": Path(folder).is_dir(), "trust_remote_code": False}
    try:
        return AutoTokenizer.from_pretrained(folder, **local, **options)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder}: its tokenizer cannot be loaded: {first}") from None


def add_tokens(tokenizer: Any) -> None:
    """The image token, and a padding token where the tokenizer pads with a token that means something else."""
    from transformers import AddedToken

    tokenizer.add_tokens(AddedToken(PLACEHOLDER, special=True, normalized=False), special_tokens=True)
    if tokenizer.pad_token is None or tokenizer.pad_token in (tokenizer.unk_token, tokenizer.eos_token):
        tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.padding_side = "right"


def padded_rows(rows: int, tokens: int) -> int:
    """How many rows a vocabulary gets: those it has where they are enough for its tokens, else the next multiple of 64."""
    return rows if rows >= tokens else -(-tokens // MULTIPLE) * MULTIPLE


def pad_rows(matrix: Tensor, rows: int) -> Tensor:
    """A vocabulary's [V, D] matrix with rows added, each the mean of those that it has.

    A new row of the head then gets an average logit. (transformers' own converter draws them around that mean.)
    """
    if rows == matrix.shape[0]:
        return matrix
    mean = matrix.mean(0, dtype=torch.float32).to(matrix.dtype)
    return torch.cat([matrix, mean.expand(rows - matrix.shape[0], -1)])


def random_newline(width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A new image_newline [width]: N(0, 1) / √width, as the released code has it."""
    drawn = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return (drawn / width**0.5).to(dtype)


def llava_processor(
    tokenizer: Any,
    *,
    side: int,
    patch: int,
    images: str,
    template: str,
    strategy: str = "default",
    extra_tokens: int = 1,
    grid: Sequence[Sequence[int]] | None = None,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Any:
    """LlavaProcessor, or LlavaNextProcessor where ``images`` is "anyres".

    Args:
        tokenizer: with the image token in it.
        side: of the square that the tower sees, in pixels.
        patch: side of the tower's patches, in pixels.
        images: "square": the middle of the image; "pad": all of it on a square of the mean colour; "anyres": tiles.
        template: the chat template.
        strategy: "default" where the tower's first token is left out, else "full".
        extra_tokens: tokens of the tower beside its patches.
        grid: sizes (height, width) for "anyres", in pixels.
        mean: of the tower's colours.
        std: of the tower's colours.
    """
    from transformers import LlavaImageProcessor, LlavaNextImageProcessor, LlavaNextProcessor, LlavaProcessor

    options: dict[str, Any] = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": list(mean),
        "image_std": list(std),
    }
    if images == "anyres":
        made: Any = LlavaNextImageProcessor(
            **options, do_pad=True, image_grid_pinpoints=[list(size) for size in grid or ()]
        )
    else:
        made = LlavaImageProcessor(**options, do_pad=images == "pad")
    kind: Any = LlavaNextProcessor if images == "anyres" else LlavaProcessor
    return kind(
        image_processor=made,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=extra_tokens,
        image_token=PLACEHOLDER,
        chat_template=template,
    )


def mgm_processor(tokenizer: Any, config: Any, *, images: str, template: str) -> Any:
    """MGMProcessor for an MGMConfig: "square" takes the middle of an image, "pad" all of it on a square."""
    from transformers import LlavaImageProcessor

    from .mgm import MGMProcessor

    side = config.image_size_aux
    return MGMProcessor(
        image_processor=LlavaImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_pad=images == "pad"
        ),
        tokenizer=tokenizer,
        image_size=config.vision_config.image_size,
        patch_size=config.vision_config.patch_size,
        image_grid=config.image_grid,
        image_global=config.image_global,
        chat_template=template,
    )

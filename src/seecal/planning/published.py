"""Data sets of the recipes by the names of their files: how many records, and how many of them have an image."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A data set.

    Attributes:
        records: how many.
        with_image: the share of them that have one.
        text, labels: tokens of a record. **Assumed**: no lengths are published of any of these sets.
        source: where the first two are from.
    """

    records: int
    with_image: float
    text: int
    labels: int
    source: str


MIX = (300, 150)  # a few questions and their answers
_CAPTION = (30, 25)
PUBLISHED = {
    "blip_laion_cc_sbu_558k.json": Published(558_000, 1.0, *_CAPTION, "558 k by its name; liuhaotian/LLaVA-Pretrain"),
    "llava_v1_5_mix665k.json": Published(
        665_298,
        624_610 / 665_298,
        *MIX,
        "liuhaotian/LLaVA-Instruct-150K; counted in issue 657 of LLaVA, 40,688 without an image",
    ),
    "llava_next_mixture.json": Published(
        779_289, 1.0, *MIX, "lmms-lab/LLaVA-NeXT-Data, the nearest to the paper's, which was not released"
    ),
    "mgm_pretrain.json": Published(1_200_000, 1.0, *_CAPTION, "about 1.2 M, NOT LOOKED UP; YanweiLi/MGM-Pretrain"),
    "mgm_instruction.json": Published(1_500_000, 1.0, *MIX, "about 1.5 M, NOT LOOKED UP; YanweiLi/MGM-Instruction"),
}

"""What the collators can be told: of long records and those without a label, of decoding, and which turns are learnt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..core.contrasts import contrast_named
from ..core.options import check_choice, documented, option

ON_LONG = ("error", "drop", "truncate")
ON_BAD = ("error", "skip")
DECODINGS = ("exact", "reduced")
TRAIN_ON = ("all", "last")


@documented
@dataclass(frozen=True)
class DataOptions:
    """How CALTrainer makes batches. A collator made by hand is stricter: its ``on_long`` is "error".

    Raises:
        ValueError: a value that is none of the choices, naming both.
    """

    on_long: str = option(
        "truncate",
        "What happens to records of more than max_length tokens, image tokens included: 'truncate' cuts their "
        "text after the last image and stops where an image would have to be cut; 'drop' leaves them out; 'error' "
        "stops. They are counted, and the first is named.",
    )
    on_bad: str = option(
        "error",
        "What happens to records that fail when their batch is made (a damaged image, a text that the template refuses, no "
        "label): 'error' stops and names the record; 'skip' puts it aside in output_dir/quarantine.jsonl, and another "
        "record takes its place. They are counted.",
    )
    image_decoding: str = option(
        "exact",
        "'exact' decodes images in full; 'reduced' decodes JPEG files at 1/2, 1/4 or 1/8 of their size where "
        "that is no smaller than what the processor resizes them to: faster, with slightly other pixels.",
    )

    weights: str | None = option(
        None,
        "Folder that seecal score wrote for the same data: its weights are used, and no image is taken away. A record "
        "without scores, with another id or with other tokens is an error that names it.",
    )
    vig_percentile: float | None = option(
        None,
        "For weighting='vig': measure the gain by the image once, before training, with the model as it is then and "
        "blurred images. The threshold is what this percentage of the records with images reaches (its paper's: 70); "
        "records below it go, tokens below it are not learnt. Into output_dir/scores. Unset: threshold, in every step.",
    )
    prior_reference: str | None = option(
        None,
        "For weighting='prior': what says how likely a token is by text alone, instead of the model's own pass without "
        "the image. The folder or hub id of a language model with the same tokenizer, which is asked once before training "
        "(into output_dir/scores), or a folder that seecal score --logprobs wrote.",
    )
    train_on: str = option(
        "all",
        "Which of the assistant's turns are learnt: 'all' of a conversation, or only its 'last'. A turn whose 'loss', "
        "'weight' or 'train' is false or 0 never is.",
    )

    processor_kwargs: dict[str, Any] | str | None = option(  # noqa: RUF009  # its default is None
        None,
        "Settings of the model's processor, such as {max_pixels: 401408} (Qwen), {do_image_splitting: false} (Idefics, "
        "SmolVLM) or {size: {longest_edge: 768}}; checked against its own names, and saved with the model. {backend: pil} "
        "resizes with Pillow instead of torchvision, which is not saved.",
    )

    max_bad_records: float | None = option(
        0.1,
        "With on_bad='skip', more bad records than this end the run with a list: a share of those met so far (0.1; told "
        "from 100 on), or from 1 on a number of records. None: no limit.",
    )

    def __post_init__(self) -> None:
        check_on_long(self.on_long)
        check_on_bad(self.on_bad)
        check_max_bad(self.max_bad_records)
        check_decoding(self.image_decoding)
        check_train_on(self.train_on)
        if self.vig_percentile is not None and not 0 < self.vig_percentile <= 100:
            raise ValueError(
                f"vig_percentile={self.vig_percentile!r}: expected how many percent of the records with images stay, above "
                "0 and at most 100"
            )


def check_on_long(on_long: str) -> None:
    """ValueError unless it is one of :data:`ON_LONG`."""
    check_choice("on_long", on_long, ON_LONG)


def check_on_bad(on_bad: str) -> None:
    """ValueError unless it is one of :data:`ON_BAD`."""
    check_choice("on_bad", on_bad, ON_BAD)


def check_max_bad(value: float | None) -> None:
    """ValueError unless it is a share below 1, a whole number of records, or None."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
    if value is not None and not (number and (value < 1 or float(value).is_integer())):
        raise ValueError(
            f"max_bad_records={value!r}: expected a share from 0 to below 1, a whole number of records, or None (no limit)"
        )


def check_train_on(train_on: str) -> None:
    """ValueError unless it is one of :data:`TRAIN_ON`."""
    check_choice("train_on", train_on, TRAIN_ON)


def mapping_of(name: str, text: str) -> dict[str, Any]:
    """The mapping that ``text`` writes in JSON; ValueError, calling it ``name``, if it writes none."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{name}={text!r}: expected a mapping in JSON, such as '{{\"max_pixels\": 401408}}'")
    return found


def check_decoding(decoding: str, contrast: str | None = None) -> None:
    """ValueError for a way of decoding that is none, or under which the contrast would mean something else."""
    check_choice("image_decoding", decoding, DECODINGS)
    if decoding == "reduced" and contrast is not None and contrast_named(contrast).in_pixels:
        raise ValueError(
            f"image_decoding='reduced' with contrast={contrast!r}: its strength is measured on the pixels of the full "
            "image, and would take away more of a smaller one. Set image_decoding='exact', or another contrast."
        )

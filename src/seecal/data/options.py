"""What the collators can be told about records that are long, and how images are decoded. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.options import documented, option

ON_LONG = ("error", "drop", "truncate")


@documented
@dataclass(frozen=True)
class DataOptions:
    """How records become batches."""

    on_long: str = option(
        "error",
        "What happens to records of more than max_length tokens: 'error'; 'drop' leaves them out; 'truncate' cuts their "
        "text after the last image. Each is counted and named.",
    )
    image_decoding: str = option(
        "exact",
        "'exact' decodes images in full; 'reduced' decodes JPEG files at 1/2, 1/4 or 1/8 of their size where that is no "
        "smaller than what the processor resizes them to: faster, with slightly other pixels.",
    )

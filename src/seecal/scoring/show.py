"""``seecal.show``: one record in a notebook, its images beside its answer in colour."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from transformers.image_transforms import to_pil_image

from ..core.coloured import ColouredToken, coloured, legend
from ..core.options import CALOptions
from ..core.outputs import VisualDelta
from ..data.collators.conversation import ConversationEncoder
from ..data.images.decode import decode_image
from ..data.sources.load import Located
from .measure import Scorer
from .spans import LabelToken

_SIDE = 320  # pixels of a thumbnail's longer side


@dataclass
class Shown:
    """One record, looked at. A notebook shows it in colour; ``print`` writes its tokens and Δ.

    Attributes:
        delta: Δ of its label tokens.
        tokens: those tokens: turn, characters, text.
        images: its images, decoded: Pillow images, or the arrays that the record holds.
    """

    delta: VisualDelta
    tokens: list[LabelToken]
    images: list[Any]

    def _repr_html_(self) -> str:
        pictures = "".join(f'<img alt="image of the record" src="{_data_uri(image)}"> ' for image in self.images)
        turns: dict[int, list[ColouredToken]] = {}
        measured = zip(self.tokens, self.delta.delta.tolist(), self.delta.has_contrast.tolist(), strict=True)
        for token, delta, seen in measured:
            turns.setdefault(token.turn, []).append(ColouredToken(token.text or "∎", delta, seen))
        answers = "".join(f"<p>{coloured(tokens)}</p>" for tokens in turns.values())
        return f"<div>{pictures}{answers}{legend()}</div>"

    def __str__(self) -> str:
        measured = zip(self.tokens, self.delta.delta.tolist(), self.delta.has_contrast.tolist(), strict=True)
        return "\n".join(
            f"{f'{delta:+.2f}' if seen else '–':>6}  {token.text or '∎'!r}" for token, delta, seen in measured
        )


def show(model: Any, processor: Any, record: Mapping[str, Any], *, options: CALOptions | None = None) -> Shown:
    """A record's images and its answer, each token coloured by Δ: for notebooks.

    Args:
        model: a loaded vision-language model; its train or eval mode stays as it is.
        processor: of the model.
        record: ``messages`` and ``images`` (or ``image``), as :func:`seecal.load_records` gives it or as
            :class:`seecal.VisionCollator` takes it.
        options: None: the paper's.

    Raises:
        ValueError: a record without an answer, or whose images and placeholders differ in number.
    """
    name = str(record.get("id", "the record"))
    located = Located("the record", 0, {**record, "id": name})
    scorer = Scorer(model, processor, options or CALOptions(), batch_size=1)
    training = model.training
    model.eval()
    try:
        delta, tokens = scorer.one(located)
    finally:
        model.train(training)
    conversation = ConversationEncoder(processor).encode(record, name)
    images = [decode_image(image, name) for image in conversation.images]
    return Shown(delta, tokens, images)


def _data_uri(image: Any) -> str:
    """A thumbnail inside the page: nothing is fetched. ``image``: a Pillow image, or an array of pixels."""
    if not isinstance(image, Image.Image):
        # Of grey without a channel's axis its height could be taken for one
        image = to_pil_image(image[..., None] if image.ndim == 2 else image, do_rescale=False)
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

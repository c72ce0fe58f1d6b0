"""``seecal chat``: ask a vision-language model about one image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..data.images.decode import open_image


def load(model: str) -> tuple[Any, Any]:
    """(model, processor) of a folder, or of a hub id: on the GPU if there is one, in the precision it was saved in.

    Raises:
        ValueError: as :func:`seecal.models.loading.load_vlm`.
    """
    import torch

    from .loading import load_vlm

    network, processor = load_vlm(model)
    return network.to("cuda" if torch.cuda.is_available() else "cpu"), processor


def reply(
    model: Any,
    processor: Any,
    image: str | Path,
    question: str,
    *,
    max_new_tokens: int = 60,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The model's greedy answer to one question about one image; ``on_text`` gets it piece by piece as it is written.

    Where ``<image>`` stands in the question, there the image goes; before it if it stands nowhere.

    Raises:
        ValueError: no image, a question that marks more places than one or holds another sign for an image, or a processor
            without a chat template (PaliGemma's needs none).
    """
    import torch
    from transformers import TextStreamer

    from ..data.collators.processors import has_prefix, processed

    opened = open_image(image)
    text = _prompt(processor, question, opened)
    bos = processor.tokenizer.bos_token
    begins = has_prefix(processor) or bool(bos and text.startswith(bos))
    made = processed(processor, [text], [[opened]], prefixes=[len(text)], add_special_tokens=not begins).to(
        model.device
    )
    batch = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in made.items()}

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if on_text is not None:
                on_text(text)

    streamer = Streamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if on_text else None
    with torch.inference_mode():
        ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    return processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def _prompt(processor: Any, question: str, image: Any) -> str:
    """The text before the answer, with one placeholder for the image."""
    from ..data.collators.assistant_spans import render_prefix
    from ..data.collators.conversation import in_parts
    from ..data.collators.image_tokens import placeholder_tokens
    from ..data.collators.processors import has_prefix

    messages, _ = in_parts({"messages": [{"role": "user", "content": question}], "images": [image]}, "the question")
    signs = placeholder_tokens(processor)
    words = "".join(part.get("text", "") for part in messages[0]["content"])
    if found := next((sign for sign in signs if sign in words), None):
        raise ValueError(
            f"the question holds {found!r}, which {type(processor).__name__} takes for an image. Write <image> where the "
            "image goes, or leave it out."
        )
    if getattr(processor, "chat_template", None) or processor.tokenizer.chat_template:
        return processor.apply_chat_template(messages, add_generation_prompt=True)
    if not has_prefix(processor):
        raise ValueError(
            f"{type(processor).__name__} has no chat template, so a question cannot be put to the model. Put the "
            "chat_template.jinja of the instruction-tuned model of its family into its folder."
        )
    answer = [{"type": "text", "text": "."}]
    rendered = render_prefix(
        [*messages, {"role": "assistant", "content": answer}], signs[0], str(processor.tokenizer.bos_token), "", "chat"
    )
    return rendered.text[: rendered.spans[0][0]]

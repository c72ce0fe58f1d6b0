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
    """The model's greedy answer to one question about one image; ``on_text`` gets it piece by piece as it is written."""
    import torch
    from transformers import TextStreamer

    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    bos = processor.tokenizer.bos_token
    adds = {"add_special_tokens": not (bos and text.startswith(bos))}
    batch = processor(text=[text], images=[open_image(image)], return_tensors="pt", **adds).to(model.device)
    batch = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in batch.items()}

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if on_text is not None:
                on_text(text)

    streamer = Streamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if on_text else None
    with torch.inference_mode():
        ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    return processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()

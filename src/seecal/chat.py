"""``seecal chat``: ask a vision-language model about one image."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .data.images import open_image


def load(model: str) -> tuple[Any, Any]:
    """(model, processor) of a folder, or of a hub id: on the GPU if there is one, in the precision it was saved in.

    No code of a model's author is run. A folder is read offline.

    Raises:
        ValueError: the folder does not exist, holds no model, or one that takes no images.
    """
    folder = Path(model)
    if not folder.is_dir():
        _refuse_missing(model, folder)
    else:
        _refuse_other_folders(folder)

    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as KNOWN

    local = {"local_files_only": folder.is_dir(), "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(model, **local)
        if type(config) not in KNOWN:
            raise ValueError(f"{model}: a {config.model_type} model takes no images: give a vision-language model")
        processor = AutoProcessor.from_pretrained(model, **local)
        network = AutoModelForImageTextToText.from_pretrained(model, dtype="auto", **local)
    except OSError as error:
        raise ValueError(f"{model}: cannot be loaded: {_first_line(error)}") from None
    return network.eval().to("cuda" if torch.cuda.is_available() else "cpu"), processor


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


def _refuse_missing(model: str, folder: Path) -> None:
    """A path that is not there, told from a hub id such as llava-hf/llava-1.5-7b-hf."""
    if folder.exists():
        raise ValueError(f"{model}: this is a file. Give the folder that holds config.json.")
    looks_like_id = model.count("/") <= 1 and not model.startswith((".", "/", "~")) and model.count("/") == 1
    if not looks_like_id or folder.parent.is_dir():
        raise ValueError(f"{model}: no such folder. Give a model's folder, or a hub id (owner/name).")


def _refuse_other_folders(folder: Path) -> None:
    config = folder / "config.json"
    if (folder / "model" / "config.json").exists() and not config.exists():
        raise ValueError(f"{folder}: no config.json here, but there is one in {folder / 'model'}: give that folder.")
    if not config.exists():
        raise ValueError(f"{folder}: no model in this folder: it has no config.json.")
    try:
        json.loads(config.read_text("utf8"))
    except ValueError:
        raise ValueError(f"{config}: not valid JSON; the model's folder is damaged. Copy it again.") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

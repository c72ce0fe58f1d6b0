"""Answers of a vision-language model: ``seecal chat`` about one image, and to the records of a data set in batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..data.images.decode import decode_image, open_image


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

    from ..data.collators.conversation import in_parts

    messages, images = in_parts(
        {"messages": [{"role": "user", "content": question}], "images": [open_image(image)]}, "the question"
    )
    batch = _batch(model, processor, [_Prompt("the question", _text_of(processor, messages, "the question"), images)])

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if on_text is not None:
                on_text(text)

    streamer = Streamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if on_text else None
    with torch.inference_mode():
        ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    return processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()


# ---- Many records ----


def answers(
    model: Any,
    processor: Any,
    records: Iterable[Mapping[str, Any]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    generation: Mapping[str, Any] | None = None,
) -> list[str]:
    """The model's greedy answers to the questions of ``records``, one text each, in their order.

    Args:
        model: a vision-language model on its device; its modes are as before afterwards, and CAL plays no part.
        processor: of the model, with a chat template (PaliGemma's needs none).
        records: in any format of ``seecal.FORMATS``; asked is everything before the last message where that is the
            assistant's, else everything. Rows with no, one or several images may stand in one batch.
        max_new_tokens: longest answer, in tokens.
        batch_size: records in one call of ``model.generate``.
        generation: more arguments of ``generate``, such as ``{"num_beams": 3}`` or ``{"do_sample": True}``.

    Raises:
        ValueError: a record that cannot be asked, or a batch that processor or model fail on, naming the records.
    """
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "generation": generation}
    return [text for batch in batches_of_answers(model, processor, records, **options) for text in batch]


def batches_of_answers(
    model: Any,
    processor: Any,
    records: Iterable[Mapping[str, Any]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    generation: Mapping[str, Any] | None = None,
) -> Iterator[list[str]]:
    """What :func:`answers` gives, batch by batch as they come: ``batch_size`` texts, the last fewer."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: expected a whole number of records, 1 or more")
    from ..data.collators.conversation import record_name

    rest, done = iter(records), 0
    while some := list(islice(rest, batch_size)):
        prompts = [prompt_of(processor, record, record_name(record, done + at)) for at, record in enumerate(some)]
        done += len(some)
        yield generated(model, processor, prompts, max_new_tokens=max_new_tokens, generation=generation)


@dataclass(frozen=True)
class _Prompt:
    """What stands before an answer: ``text`` with a placeholder for each of ``images``; errors call it ``name``."""

    name: str
    text: str
    images: list[Any]


def prompt_of(processor: Any, record: Mapping[str, Any], name: str, chat_template: str | None = None) -> _Prompt:
    """The question of a record, its images decoded. ``chat_template``: instead of the processor's.

    Raises:
        ValueError, FileNotFoundError: it cannot be asked; calling it ``name``.
    """
    from ..data.collators.conversation import in_parts

    messages, images = in_parts(record, name)
    if messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    if not messages:
        raise ValueError(f"{name}: nothing stands before its last answer, so there is nothing to ask. Leave it out.")
    asked = sum(part["type"] == "image" for message in messages for part in message["content"])
    text = _text_of(processor, messages, name, chat_template)
    return _Prompt(name, text, [decode_image(image, name) for image in images[:asked]])


def generated(
    model: Any,
    processor: Any,
    prompts: list[_Prompt],
    *,
    max_new_tokens: int = 128,
    generation: Mapping[str, Any] | None = None,
) -> list[str]:
    """The answers to one batch of prompts. ValueError naming them where the processor or the model fails."""
    import torch

    settings = {"do_sample": False, **(generation or {})}
    try:
        batch = _batch(model, processor, prompts)
    except Exception as error:  # whatever a family's own code says of its inputs
        failing = [one.name for one in prompts if _fails(model, processor, one)] or [one.name for one in prompts]
        raise ValueError(
            f"{', '.join(failing)}: {type(processor).__name__} failed on the question: {_said(error)}. Leave such records "
            "out, or load the processor from the model's folder."
        ) from error
    try:
        with in_eval_mode(model):  # without inference mode, whose tensors a training cannot go on with
            ids = model.generate(**batch, max_new_tokens=max_new_tokens, **settings)
    except Exception as error:
        smaller = " Set a smaller batch_size." if isinstance(error, torch.OutOfMemoryError) and len(prompts) > 1 else ""
        raise ValueError(
            f"{', '.join(one.name for one in prompts)}: {type(model).__name__} failed to answer: {_said(error)}.{smaller}"
        ) from error
    new = ids[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]


@contextlib.contextmanager
def in_eval_mode(model: Any) -> Iterator[None]:
    """Every module in eval mode; in its own again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _fails(model: Any, processor: Any, prompt: _Prompt) -> bool:
    try:
        _batch(model, processor, [prompt])
    except Exception:
        return True
    return False


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(". ")


def _batch(model: Any, processor: Any, prompts: list[_Prompt]) -> dict[str, Any]:
    """The model's inputs [B, L] for prompts, padded on the left, on its device and in its precision."""
    from ..data.collators.processors import has_prefix, processed

    bos, texts = processor.tokenizer.bos_token, [one.text for one in prompts]
    begin = {has_prefix(processor) or bool(bos and text.startswith(bos)) for text in texts}
    if len(begin) > 1:
        raise ValueError("the chat template writes the token that begins a text for some of the records only")
    made = processed(
        processor,
        texts,
        [one.images for one in prompts],
        prefixes=[len(text) for text in texts],
        add_special_tokens=not begin.pop(),
        padding_side="left",
    ).to(model.device)
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in made.items()}


def _text_of(processor: Any, messages: list[dict[str, Any]], name: str, chat_template: str | None = None) -> str:
    """The text before the answer to ``messages``, whose contents are parts, with one placeholder for each image."""
    from ..data.collators.assistant_spans import render_prefix
    from ..data.collators.image_tokens import placeholder_tokens
    from ..data.collators.processors import has_prefix
    from ..data.collators.template_forms import in_a_form_it_takes

    signs = placeholder_tokens(processor)
    words = "".join(part.get("text", "") for message in messages for part in message["content"])
    if found := next((sign for sign in signs if sign in words), None):
        raise ValueError(
            f"{name} holds {found!r}, which {type(processor).__name__} takes for an image. Write <image> where the "
            "image goes, or leave it out."
        )
    template = chat_template or getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if template:
        names = processor.tokenizer.special_tokens_map
        form, _, _ = in_a_form_it_takes(messages, template, names, name, False)
        return processor.apply_chat_template(
            [form(message) for message in messages], chat_template=template, add_generation_prompt=True
        )
    if not has_prefix(processor):
        raise ValueError(
            f"{type(processor).__name__} has no chat template, so a question cannot be put to the model. Put the "
            "chat_template.jinja of the instruction-tuned model of its family into its folder."
        )
    answer = [{"type": "text", "text": "."}]
    rendered = render_prefix(
        [*messages, {"role": "assistant", "content": answer}], signs[0], str(processor.tokenizer.bos_token), "", name
    )
    return rendered.text[: rendered.spans[0][0]]

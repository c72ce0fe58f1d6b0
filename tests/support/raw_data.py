"""Images and messages in the form of each family's own processor, and the zoo's model with that processor's ids."""

import copy
import functools

import torch
from datasets import Dataset, Features, Image, Sequence, Value

from seecal.families.table import decoder_of
from tests.support import processors, zoo
from tests.support.tiny import tiny_image
from tests.support.zoo_models import ZOO


@functools.cache
def processor_of(family):
    return getattr(processors, family)()


# ---------------------------------------------------------------- records


def image():
    return {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def user(*content):
    return {"role": "user", "content": list(content)}


def assistant(words):
    return {"role": "assistant", "content": [text(words)]}


def turns_of(family):
    """Several images in several turns; one image; no image. PaliGemma's own form has one question and one answer."""
    several = [user(image(), text("What colour"), image(), text(" is it?")), assistant("It is red.")]
    if family != "paligemma":
        several += [user(image(), text("It is?")), assistant("It is blue. It is not red.")]
    one = [user(image(), text("What?")), assistant("It is green.")]
    return [several, one, [user(text("What is it?")), assistant("It is.")]]


def records(family):
    colours = iter(["red", "blue", "green", "yellow"])
    sizes = iter([(48, 48), (90, 40), (32, 64), (20, 30)])
    found = []
    for index, messages in enumerate(turns_of(family)):
        count = sum(part["type"] == "image" for message in messages for part in message["content"])
        shown = [tiny_image(next(colours), next(sizes)) for _ in range(count)]
        found.append({"id": f"r{index}", "messages": messages, "images": shown})
    return found


def dataset(family):
    """As a ``datasets`` set, the record without an image first."""
    part = {"type": Value("string"), "text": Value("string")}
    columns = {"id": Value("string"), "messages": [{"role": Value("string"), "content": [part]}]}
    return Dataset.from_list(records(family)[::-1], features=Features({**columns, "images": Sequence(Image())}))


# ---------------------------------------------------------------- models


def model_of(family):
    """The zoo's model with the ids of the family's processor."""
    tokenizer, config = processor_of(family).tokenizer, copy.deepcopy(ZOO[family].model().config)
    to_id = tokenizer.convert_tokens_to_ids
    words = len(tokenizer)
    for field, token in IDS[family].items():
        found = [to_id(one) for one in token] if isinstance(token, tuple) else to_id(token)
        setattr(config, field, found)
    if family == "mllama":
        words = config.image_token_index  # its images stand beyond the text vocabulary
    for one in (config, config.get_text_config()):
        if hasattr(one, "vocab_size"):
            one.vocab_size = words
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    return zoo.scaled(type(ZOO[family].model())(config), ZOO[family])


_QWEN = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
IDS = {
    **{
        name: {"image_token_id": "<image>"}
        for name in ("llava", "llava_next", "mgm", "idefics3", "smolvlm", "paligemma")
    },
    "llava_onevision": {"image_token_id": "<image>", "video_token_id": "<video>"},
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "internvl": {"image_token_id": "<IMG_CONTEXT>"},
    "gemma3": {
        "image_token_id": "<image_soft_token>",
        "boi_token_index": "<start_of_image>",
        "eoi_token_index": "<end_of_image>",
    },
    "mistral3": {"image_token_id": "[IMG]"},
    "glm4v": {
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    },
    "ovis2": {
        "image_token_id": "<IMG_ATOM>",
        "visual_indicator_token_ids": ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
    },
    "mllama": {"image_token_id": "<|image|>"},
}


def layers_of(model):
    """Names of the query and value projections of the text decoder."""
    decoder = decoder_of(model)
    inside = {id(module) for module in decoder.modules()}
    return [
        name for name, module in model.named_modules() if id(module) in inside and name.endswith(("q_proj", "v_proj"))
    ]

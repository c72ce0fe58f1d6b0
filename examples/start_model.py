"""What the paper's training starts from: a language model and a CLIP tower, joined by a projector of random numbers.

    python examples/start_model.py llava lmsys/vicuna-7b-v1.5 openai/clip-vit-large-patch14-336 models/llava-1.5-7b-start

FAMILY is llava or llava_next. The language model and the tower are folders or hub ids. The last argument is the folder to
write: a plain transformers model with processor and Vicuna's chat template.
"""

import argparse
from pathlib import Path

import torch
import transformers as hf

import seecal

TEMPLATE = (Path(seecal.__file__).parent / "data" / "templates" / "vicuna_v1.jinja").read_text("utf8")
CLASSES = {
    "llava": (hf.LlavaConfig, hf.LlavaForConditionalGeneration, hf.LlavaImageProcessor, hf.LlavaProcessor),
    "llava_next": (
        hf.LlavaNextConfig,
        hf.LlavaNextForConditionalGeneration,
        hf.LlavaNextImageProcessor,
        hf.LlavaNextProcessor,
    ),
}


def build(family: str, language_model: str, vision_tower: str):
    """(model, processor), in the precision that the language model was saved in."""
    make_config, make_model, make_images, make_processor = CLASSES[family]
    tokenizer = hf.AutoTokenizer.from_pretrained(language_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<pad>"})
    text = hf.AutoModelForCausalLM.from_pretrained(language_model, dtype="auto")
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    vision = hf.CLIPVisionModel.from_pretrained(vision_tower, dtype=text.dtype)
    side, patch = vision.config.image_size, vision.config.patch_size
    options = {}
    if family == "llava_next":
        options = {"image_grid_pinpoints": [[a * side, b * side] for a, b in ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))]}
    config = make_config(
        vision_config=vision.config,
        text_config=text.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(side // patch) ** 2,
        vision_feature_layer=-2,
        **options,
    )
    config.text_config.pad_token_id = tokenizer.pad_token_id
    with torch.device("meta"):  # the big parts come next: no room for a second set of them
        model = make_model(config)
    torch.manual_seed(0)
    for name, module in model.model.multi_modal_projector.named_children():
        if isinstance(module, torch.nn.Linear):
            fresh = torch.nn.Linear(module.in_features, module.out_features, dtype=text.dtype)
            setattr(model.model.multi_modal_projector, name, fresh)
    if family == "llava_next":
        width = config.text_config.hidden_size
        model.model.image_newline = torch.nn.Parameter(torch.randn(width, dtype=text.dtype) / width**0.5)
    model.model.language_model, model.lm_head, model.model.vision_tower = text.model, text.lm_head, vision
    size = {"shortest_edge": side}
    images = make_images(size=size, crop_size={"height": side, "width": side}, do_pad=True, **options)
    processor = make_processor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return model, processor


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(CLASSES))
    for name in ("language_model", "vision_tower", "folder"):
        parser.add_argument(name)
    given = parser.parse_args()
    for part in build(given.family, given.language_model, given.vision_tower):
        part.save_pretrained(given.folder)
    print(f"{given.folder}: a {given.family} to train, its projector untrained")

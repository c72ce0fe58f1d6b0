"""seecal chat: the model is asked in the form that it was trained in, and what cannot be asked is one line."""

from types import SimpleNamespace

import pytest
import torch
import transformers as hf

from seecal import VisionCollator
from seecal.models.generate import load, reply
from tests.support import processors
from tests.support.tiny import tiny_image, tiny_llava, tiny_llava_processor

QUESTION = "What colour is it?"


@pytest.fixture
def red(tmp_path):
    path = tmp_path / "red.png"
    tiny_image("red").save(path)
    return path


def asked(processor, image, question=QUESTION, dtype=torch.float32):
    """What the model is given for a question."""
    seen = {}

    def generate(input_ids, **rest):
        seen.update(input_ids=input_ids, **rest)
        return torch.cat([input_ids, input_ids[:, :0]], 1)

    reply(SimpleNamespace(device="cpu", dtype=dtype, generate=generate), processor, image, question)
    return seen


def before_the_answer(processor, image, content=QUESTION):
    """What the model reads in training up to its first label."""
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "It is red."}]
    batch = VisionCollator(processor)([{"messages": messages, "images": [str(image)]}])
    first = int((batch["labels"][0] != -100).nonzero()[0])
    return {name: batch[name][:, :first] for name in ("input_ids", "attention_mask")}, batch["pixel_values"]


@pytest.mark.parametrize("family", ["paligemma", "llava_next", "qwen2_vl", "mistral3", "internvl"])
def test_a_question_is_what_training_puts_before_an_answer(family, red):
    processor = getattr(processors, family)()
    found = asked(processor, red)
    expected, pixels = before_the_answer(processor, red)
    for name, one in expected.items():
        assert found[name].tolist() == one.tolist(), name
    assert torch.equal(found["pixel_values"], pixels)


def test_paligemma_reads_all_of_the_question_in_both_directions(red):
    found = asked(processors.paligemma(), red)
    assert not found["token_type_ids"].any()
    assert found["token_type_ids"].shape == found["input_ids"].shape


def test_pixels_have_the_models_precision(red):
    for dtype in (torch.bfloat16, torch.float32):
        found = asked(tiny_llava_processor(), red, dtype=dtype)
        assert found["pixel_values"].dtype == dtype
        assert found["input_ids"].dtype == torch.long


def test_where_the_image_stands_in_a_question(red):
    """``<image>`` marks its place, as in the records; without it, the image comes first."""
    processor = tiny_llava_processor()
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    for question, content in (
        ("<image>\nWhat is it?", [{"type": "image"}, {"type": "text", "text": "What is it?"}]),
        ("What is it? <image>", [{"type": "text", "text": "What is it?"}, {"type": "image"}]),
        ("What is it?", [{"type": "image"}, {"type": "text", "text": "What is it?"}]),
    ):
        found = asked(processor, red, question)
        expected, _ = before_the_answer(processor, red, content)
        start = found["input_ids"].shape[1]
        assert found["input_ids"].tolist() == expected["input_ids"][:, :start].tolist()
        assert int((found["input_ids"] == image).sum()) == 16


@pytest.mark.parametrize(
    ("make", "question", "message"),
    [
        (processors.llava, "<image> or <image>?", r"the question: 1 image, but 2 placeholders"),
        (processors.qwen2_vl, "What is <|image_pad|>?", r"the question.*'<\|image_pad\|>'.*Write <image> where"),
        (processors.gemma3, "<start_of_image> What?", "the question holds '<start_of_image>'"),
    ],
)
def test_what_cannot_be_asked_is_one_line(make, question, message, red):
    with pytest.raises(ValueError, match=message):
        asked(make(), red, question)


def test_a_processor_without_a_chat_template_says_what_is_missing(red):
    processor = processors.llava()
    processor.chat_template = None
    with pytest.raises(ValueError, match=r"LlavaProcessor has no chat template.*Put the chat_template\.jinja"):
        asked(processor, red)


def paligemma_of(processor):
    text = hf.GemmaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=False,  # tied and random, it would repeat the last token for ever
    )
    vision = hf.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=32,
        vision_use_head=False,
    )
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    sizes = {"projection_dim": 32, "hidden_size": 32, "tie_word_embeddings": False}
    config = hf.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=image, **sizes)
    return scaled(hf.PaliGemmaForConditionalGeneration(config))


def scaled(model):
    """The image matters, and no token is as likely as another."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


def greedy(model, batch, count, **grown):
    """The answer's ids, each from a forward over everything before it; ``grown``: what each of them has beside its id."""
    ids, pixels = batch["input_ids"], batch["pixel_values"]
    rest = {name: batch[name] for name in grown}
    found = []
    with torch.no_grad():
        for _ in range(count):
            logits = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), **rest).logits
            found.append(int(logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([[found[-1]]])], 1)
            rest = {name: torch.cat([rest[name], torch.tensor([[one]])], 1) for name, one in grown.items()}
    return found


@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_the_answer_is_the_models_own(family, red):
    if family == "llava":
        processor, model, grown = tiny_llava_processor(), tiny_llava().eval(), {}
    else:
        processor = processors.paligemma()
        model, grown = paligemma_of(processor), {"token_type_ids": 1}
    model.generation_config.eos_token_id = None
    expected = greedy(model, asked(processor, red), 6, **grown)
    pieces = []
    answer = reply(model, processor, red, QUESTION, max_new_tokens=6, on_text=pieces.append)
    assert answer == processor.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert "".join(pieces).strip() == answer
    assert len(set(expected)) > 1, "not the same token over and over"


def test_a_model_in_bfloat16_from_its_folder(tmp_path, red):
    processor, model = tiny_llava_processor(), tiny_llava().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    loaded, its_processor = load(str(tmp_path / "model"))
    assert loaded.dtype == torch.bfloat16
    assert isinstance(reply(loaded, its_processor, red, QUESTION, max_new_tokens=2), str)

"""A processor or a template that does not belong to the model: which one, and what to do, before a step is taken."""

import logging
import re

import pytest
import transformers as hf

from seecal import CALConfig, CALTrainer
from seecal.data.collators import assistant_spans as turns
from seecal.data.collators.vision import VisionCollator
from tests.families.test_raw_data import assistant, dataset, model_of, processor_of, records, text, user
from tests.support import processors


def trainer(model, processor, family="llava"):
    args = CALConfig(
        "unused", max_steps=1, report_to="none", save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True
    )
    return CALTrainer(model_of(model), args, train_dataset=dataset(family), processing_class=processor)


def wrong_template(family, template, *rows):
    with pytest.raises(ValueError) as caught:
        VisionCollator(processor_of(family), chat_template=template)(list(rows) or records(family))
    return str(caught.value)


# ---------------------------------------------------------------- of another family


@pytest.mark.parametrize(
    ("model", "processor", "own"),
    [
        ("llava", "qwen2_5_vl", "LlavaProcessor"),
        ("qwen3_vl", "mistral3", "Qwen3VLProcessor"),
        ("gemma3", "llava", "Gemma3Processor"),
        ("ovis2", "llava_next", "Ovis2Processor"),
        ("mllama", "internvl", "MllamaProcessor"),
        ("paligemma", "glm4v", "PaliGemmaProcessor"),
        ("glm4v", "paligemma", "Glm4vProcessor"),
    ],
)
def test_a_processor_of_another_family(model, processor, own):
    other, config = processor_of(processor), model_of(model).config
    token = next(name for name in ("<|image_pad|>", "<image>", "<IMG_CONTEXT>", "<|image|>", "[IMG]")
                 if name in other.tokenizer.get_added_vocab())  # fmt: skip
    with pytest.raises(ValueError) as caught:
        trainer(model, other)
    said = str(caught.value)
    assert f"{type(other).__name__} makes" in said
    assert f"{token!r} (id {other.tokenizer.convert_tokens_to_ids(token)})" in said
    assert re.search(rf"puts image features at id (\d+ or )?{config.image_token_id}\b", said)
    assert f"is {own}. Pass the processor saved with this model as processing_class" in said


def test_the_same_ids_but_another_layout(caplog):
    """LLaVA's processor has no sizes for LLaVA-NeXT: said before, and again with the model's own failure."""
    with caplog.at_level(logging.WARNING, logger="seecal"):
        this = trainer("llava_next", processor_of("llava"))
    assert (
        "the processor is LlavaProcessor; transformers' processor for 'llava_next' is LlavaNextProcessor" in caplog.text
    )
    with pytest.raises(ValueError, match=r"the model failed on the processor's batch \(.+\)\. The processor is Llava"):
        this.train()


def test_an_id_that_the_config_does_not_know():
    processor = processor_of("llava")
    model = model_of("llava")
    model.config.image_token_id = 5
    args = CALConfig("unused", max_steps=1, report_to="none", save_strategy="no", use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=r"puts image features at id 5 .*set the config's image_token_id to its id"):
        CALTrainer(model, args, train_dataset=dataset("llava"), processing_class=processor)


def test_prompt_completion_data_is_checked_too():
    rows = dataset("llava").map(
        lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:2]}, remove_columns="messages"
    )
    args = CALConfig("unused", max_steps=1, report_to="none", save_strategy="no", use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=r"Qwen2_5_VLProcessor makes '<\|image_pad\|>'"):
        CALTrainer(model_of("llava"), args, train_dataset=rows, processing_class=processor_of("qwen2_5_vl"))


def test_a_processor_that_fails_on_an_image():
    processor = processors.llava()
    processor.patch_size = None  # as in folders saved by an older transformers
    with pytest.raises(
        ValueError, match=r"LlavaProcessor cannot make an input .* '<image>': unsupported .* 'NoneType'"
    ):
        trainer("llava", processor)
    with pytest.raises(
        ValueError, match=r"record 'r0', .*: LlavaProcessor failed on them: unsupported .* model's folder"
    ):
        VisionCollator(processor)(records("llava"))


# ---------------------------------------------------------------- templates


def test_a_template_of_another_family():
    said = wrong_template("llava", processors.qwen2_5_vl().chat_template)
    assert "record 'r0': the chat template wrote no placeholder ('<image>') for its 3 images" in said
    assert "of another family than LlavaProcessor. Use the one that comes with the model's own processor" in said


def test_a_template_for_text_writes_no_placeholder():
    said = wrong_template("qwen2_5_vl", processors.chatml(""))
    assert "wrote no placeholder ('<|image_pad|>') for its 3 images: it is a template for text" in said


CONTENT_AS_TEXT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize("how", ["", " | trim"])
def test_a_template_that_takes_texts_only(how):
    template = CONTENT_AS_TEXT.replace("m.content", "m.content" + how)
    said = wrong_template("qwen2_5_vl", template)
    assert "writes a message's list of parts as Python does" in said
    assert "Use the one that comes with the model's own processor" in said
    collator = VisionCollator(processor_of("qwen2_5_vl"), chat_template=template)
    batch = collator(records("qwen2_5_vl")[2:])  # no image: then it is given texts
    assert collator.tokenizer.decode(batch["input_ids"][0]) == (
        "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nIt is.<|im_end|>\n"
    )
    assert collator.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]) == "It is.<|im_end|>"


def test_a_template_that_adds_texts_up():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content }}<|im_end|>\n{% endfor %}"
    assert "the chat template cannot render its messages" in wrong_template("qwen2_5_vl", template)
    VisionCollator(processor_of("qwen2_5_vl"), chat_template=template)(records("qwen2_5_vl")[2:])


TURN = "<|im_start|>{{ m.role }}\n" + processors.TEXTS + "<|im_end|>\n"


def said_twice():
    """A conversation in which a message says what another one says."""
    question = user(text("It is?"))
    turns = [question, assistant("It is."), question, assistant("b")]
    return {"id": "z", "messages": [{"role": "system", "content": "Be brief."}, *turns], "images": []}


@pytest.mark.parametrize(
    ("condition", "index"), [("m.role != 'assistant'", 2), ("loop.index > 3", 2), ("loop.index != 5", 4)]
)
def test_a_template_that_drops_answers(condition, index):
    template = f"{{% for m in messages %}}{{% if {condition} %}}{TURN}{{% endif %}}{{% endfor %}}"
    said = wrong_template("qwen2_5_vl", template, said_twice())
    assert f"record 'z': the chat template leaves out its message {index} (role 'assistant')" in said
    assert "Use a template that writes every answer, or take this one out" in said


@pytest.mark.parametrize(
    ("condition", "role"), [("m.role != 'system'", "system"), ("m.role != 'user'", "user"), ("loop.index != 4", "user")]
)
def test_a_template_that_drops_what_others_say_does_so_aloud(condition, role, caplog):
    """LLaVA's template of projector training leaves out the question: image, then caption."""
    template = f"{{% for m in messages %}}{{% if {condition} %}}{TURN}{{% endif %}}{{% endfor %}}"
    turns._say_left_out.cache_clear()
    collate = VisionCollator(processor_of("qwen2_5_vl"), chat_template=template)
    for _ in range(2):
        batch = collate([said_twice()])
    assert caplog.text.count(f"leaves out what the role '{role}' says") == 1
    assert collate.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]).startswith("It is.<|im_end|>")


def test_a_template_may_change_what_the_user_says():
    template = processors.chatml("").replace("{{ part.text }}", "b{{ part.text | reverse }}", 1)
    collator = VisionCollator(processor_of("qwen2_5_vl"), chat_template=template)
    batch = collator(records("qwen2_5_vl")[2:])
    assert "b?ti si tahW" in collator.tokenizer.decode(batch["input_ids"][0])


def test_a_template_with_markers_that_drops_a_question(caplog):
    template = processors.with_markers(processors.qwen2_5_vl().chat_template)
    template = template.replace("{% for m in messages %}", "{% for m in messages if m.role == 'assistant' %}")
    turns._say_left_out.cache_clear()
    VisionCollator(processor_of("qwen2_5_vl"), chat_template=template)(records("qwen2_5_vl")[2:])
    assert "leaves out what the role 'user' says" in caplog.text


# ---------------------------------------------------------------- neither tokenizer nor template


def test_no_template():
    processor = processors.qwen3_vl()
    processor.chat_template = None
    with pytest.raises(ValueError, match=r"Qwen3VLProcessor has no chat template.*Set processor.chat_template"):
        trainer("qwen3_vl", processor)


def test_a_slow_tokenizer():
    slow = hf.ByT5Tokenizer(extra_ids=0, additional_special_tokens=["<image>"])
    images = hf.CLIPImageProcessor(size=processors.SIZE, crop_size=processors.SIZE)
    processor = hf.LlavaProcessor(images, slow, patch_size=8, vision_feature_select_strategy="default",
                                  num_additional_image_tokens=1, chat_template=processors.vicuna())  # fmt: skip
    with pytest.raises(
        ValueError, match=r"ByT5Tokenizer is a slow tokenizer.*Load the processor with its fast tokenizer"
    ):
        trainer("llava", processor)

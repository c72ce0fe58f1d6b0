"""The recipes that come with seecal: the paper's figures, their baselines, their templates and labels."""

import re

import pytest
import transformers as hf
from jinja2.exceptions import TemplateError

from seecal import VisionCollator
from seecal.core.options import CALOptions
from seecal.data.chat_templates import TEMPLATES, chat_template
from seecal.recipes.layers import SHIPPED
from seecal.recipes.recipe import arguments, read
from tests.support import processors
from tests.support.paths import ROOT
from tests.support.sources import messages
from tests.support.tiny import tiny_image

PAPER = [
    *("llava-1.5-7b", "llava-1.5-13b", "llava-next-7b", "llava-next-13b"),
    *("mgm-2b", "mgm-7b", "mgm-13b", "mgm-hd-7b", "mgm-hd-13b"),
]
MODERN = ["qwen3-vl-lora", "internvl-lora", "smolvlm-full", "paligemma-lora", "gemma3-qlora"]
HERE = ["--use_cpu", "true", "--bf16", "false"]
PAGE = (ROOT / "docs" / "recipes.md").read_text("utf8")
# | `name` | GPUs | records of a step in each stage |
TABLE = {
    name: (int(gpus), [int(one) for one in records.split(", ")])
    for name, gpus, records in re.findall(r"^\| `([\w.-]+)` \| (\d+) \| ([\d, ]+) \|", PAGE, re.M)
}


def configs(name, tmp_path):
    return [stage.config(tmp_path) for stage in read(name, arguments(HERE)).stages]


def test_these_come_with_seecal():
    assert {one.stem for one in SHIPPED.glob("*.yaml")} == {"tiny", *PAPER, *MODERN}
    assert set(TABLE) == {*PAPER, *MODERN}, "the table of docs/recipes.md"
    assert read("tiny").stages[0].name == "align"


@pytest.mark.parametrize("name", [*PAPER, *MODERN])
def test_the_records_of_a_step_are_those_of_the_page(name, tmp_path):
    gpus, records = TABLE[name]
    found = [
        gpus * one.per_device_train_batch_size * one.gradient_accumulation_steps for one in configs(name, tmp_path)
    ]
    assert found == records
    if name in PAPER:
        assert records == ([128] if "hd" in name else [256, 128])


@pytest.mark.parametrize("name", [*PAPER, *MODERN])
def test_the_baseline_differs_in_the_weighting_alone(name):
    cal, uniform = (read(name, arguments(["--weighting", one])) for one in ("cal", "uniform"))
    plain = read(name)
    for stage, twin, own in zip(cal.stages, uniform.stages, plain.stages, strict=True):
        assert own.settings.get("weighting", CALOptions().weighting) == "cal"
        assert twin.settings == {**stage.settings, "weighting": "uniform"}
        assert vars(twin) == {**vars(stage), "settings": twin.settings}
    assert (cal.model, cal.output_dir) == (uniform.model, uniform.output_dir)


@pytest.mark.parametrize("weighting", ["cal", "uniform"])
def test_the_released_codes_options_go_with_either(weighting, tmp_path):
    for stage in read("mgm-2b", arguments([*HERE, "--preset", "released", "--weighting", weighting])).stages:
        options = stage.config(tmp_path).cal_options()
        assert (options.normalize, options.pool_scope, options.contrast) == ("micro_batch", "released", "mask")
        assert options.weighting == weighting


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_figures(name, tmp_path):
    """RECIPES.md's table, stage by stage; the last one is the one that tunes."""
    recipe, found = read(name, arguments(HERE)), configs(name, tmp_path)
    assert [one.learning_rate for one in found] == ([2e-5] if "hd" in name else [1e-3, 2e-5])
    for stage, one in zip(recipe.stages, found, strict=True):
        assert (one.lr_scheduler_type.value, one.warmup_steps, one.weight_decay) == ("cosine", 0.03, 0)
        assert (one.num_train_epochs, one.optim.value, one.seed, one.max_grad_norm) == (1, "adamw_torch", 42, 0)
        assert one.max_length == (4096 if "next" in name or "hd" in name else 2048)
        assert one.cal_options() == CALOptions(), "the paper's CAL, in every stage"
        assert stage.check_gradients
        assert one.processor_kwargs["backend"] == "pil"
        padded = {"align": False, "tune": True}[stage.name]
        assert one.processor_kwargs.get("do_pad") is (None if "next" in name else padded)
        template = "gemma" if name == "mgm-2b" else "plain" if stage.name == "align" else "vicuna_v1"
        assert stage.chat_template == chat_template(template)
        strategy = {"align": "random", "tune": "group_by_modality_length"}[stage.name]
        assert one.train_sampling_strategy == strategy
    *_, tune = recipe.stages
    if "next" in name:
        assert tune.train == ("projector", "image_newline", "language_model", "vision_tower")
        assert tune.learning_rates == {"vision_tower": 2e-6}, "a tenth"
    else:
        assert tune.train == ("projector", "language_model")
        assert tune.learning_rates == {}
    if "hd" not in name:
        assert recipe.stages[0].train == ("projector",)


def test_13b_is_7b_but_for_the_model_and_how_a_step_is_cut():
    for family in ("llava-1.5", "llava-next", "mgm", "mgm-hd"):
        small, large = read(f"{family}-7b"), read(f"{family}-13b")
        for one, other in zip(small.stages, large.stages, strict=True):
            cuts = ("per_device_train_batch_size", "gradient_accumulation_steps")
            kept = [{k: v for k, v in stage.settings.items() if k not in cuts} for stage in (one, other)]
            assert kept[0] == kept[1]
            assert vars(one) | {"settings": None} == vars(other) | {"settings": None}


def test_hd_goes_on_from_stage_1_of_the_plain_one():
    for size in ("7b", "13b"):
        assert read(f"mgm-hd-{size}").model == str(read(f"mgm-{size}").output_dir / "stage-1" / "model")


@pytest.mark.parametrize("name", MODERN)
def test_adapters_train_on_what_is_frozen(name, tmp_path):
    (stage,) = read(name).stages
    if name == "smolvlm-full":
        assert (stage.train, stage.lora) == (("projector", "language_model"), None)
        return
    assert stage.train == ("lora",)
    assert stage.lora.r == (64 if name == "gemma3-qlora" else 128)
    four_bits = read(name).model_init_kwargs.get("quantization_config")
    assert four_bits == ({"load_in_4bit": True} if name == "gemma3-qlora" else None)


# ---- templates ----

TURNS = [("<image>\nWhat is it?", "It is red."), ("And then?", "It is green.")]


def processor_with(*special, bos, eos):
    """LLaVA's processor around a tokenizer that has these special tokens and puts ``bos`` before a text."""
    processor = processors.llava()
    processor.tokenizer = processors.tokenizer("<image>", *special, bos=bos, eos=eos, begins=True)
    assert isinstance(processor, hf.LlavaProcessor)
    return processor


VICUNA = {"bos": "<s>", "eos": "</s>"}
GEMMA = {"bos": "<bos>", "eos": "<eos>"}


def shown(template, processor, turns):
    """(the row as text with one <image> for all, its labels as text) of a record."""
    collator = VisionCollator(processor, chat_template=chat_template(template))
    batch = collator([{"id": "a", "messages": messages(turns), "images": [tiny_image("red")]}])
    used, learnt = batch["attention_mask"][0].bool(), batch["labels"][0] != -100
    text = collator.tokenizer.decode(batch["input_ids"][0][used])
    assert batch["labels"][0][learnt].tolist() == batch["input_ids"][0][learnt].tolist()
    return re.sub(r"(<image>)+", "<image>", text), collator.tokenizer.decode(batch["labels"][0][learnt])


def test_plain_is_the_image_its_caption_and_a_line_break():
    """No question, no end of turn; <s> is read and not learnt."""
    text, labels = shown("plain", processor_with(**VICUNA), [("Describe it.\n<image>", "A red square.")])
    assert text == "<s><image>A red square.\n"
    assert labels == "A red square.\n"


def test_vicuna_v1():
    text, labels = shown("vicuna_v1", processor_with(**VICUNA), TURNS)
    assert text == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT: It is red.</s>USER: And then? "
        "ASSISTANT: It is green.</s>"
    )
    assert labels.replace(" It", "It") == "It is red.</s>It is green.</s>", (
        "a space before an answer may be its token's"
    )


@pytest.mark.parametrize(
    ("question", "asked"),
    [
        ("What is it?\n<image>", "<image>\nWhat is it?"),
        ("  What is <image> this? ", "<image>\nWhat is  this?"),
        ("<image>\n\nWhat is it?\n", "<image>\nWhat is it?"),
        ("<image>", "<image>"),
    ],
)
@pytest.mark.parametrize("name", ["vicuna_v1", "gemma"])
def test_the_image_goes_in_front_wherever_its_text_marks_it(name, question, asked):
    """As LLaVA's and MGM's preprocess_multimodal: in about half of LLaVA's mixture it is marked behind the question."""
    special, words = {"vicuna_v1": ((), VICUNA), "gemma": (("<start_of_turn>", "<end_of_turn>"), GEMMA)}[name]
    before, after = {"vicuna_v1": ("USER: ", " ASSISTANT:"), "gemma": ("user\n", "<end_of_turn>")}[name]
    text, _ = shown(name, processor_with(*special, **words), [(question, "It is red.")])
    assert text.partition(before)[2].startswith(asked + after)


def rendered(name, turns):
    """What a template makes of messages, as text."""
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=processors.tokenizer()._tokenizer, bos_token="<s>", eos_token="</s>"
    )
    return tokenizer.apply_chat_template(turns, chat_template=chat_template(name), tokenize=False)


def said(role, *parts):
    return {"role": role, "content": [{"type": "text", "text": part} if part else {"type": "image"} for part in parts]}


def test_several_images_stay_where_they_are():
    text = rendered("vicuna_v1", [said("user", "Is ", None, " like ", None, "?"), said("assistant", "No.")])
    assert text.endswith("USER: Is <image>\n like <image>\n? ASSISTANT: No.</s>")


def test_a_system_message_is_no_question():
    turns = [said("system", "Be brief."), said("user", None, "Why?"), said("assistant", "So.")]
    assert rendered("vicuna_v1", turns) == "<s>Be brief. USER: <image>\nWhy? ASSISTANT: So.</s>"
    with pytest.raises(TemplateError, match="no system turn"):
        rendered("gemma", turns)


def test_gemma_learns_both_ends_of_a_turn():
    text, labels = shown("gemma", processor_with("<start_of_turn>", "<end_of_turn>", **GEMMA), TURNS)
    assert text == (
        "<bos><start_of_turn>user\n<image>\nWhat is it?<end_of_turn>\n<start_of_turn>model\nIt is red.<end_of_turn>\n<eos>"
        "<start_of_turn>user\nAnd then?<end_of_turn>\n<start_of_turn>model\nIt is green.<end_of_turn>\n<eos>"
    )
    assert labels == "It is red.<end_of_turn>\n<eos>It is green.<end_of_turn>\n<eos>"


def test_paligemma_in_several_turns():
    collator = VisionCollator(processors.paligemma(), chat_template=chat_template("paligemma"))
    batch = collator([{"id": "a", "messages": messages(TURNS), "images": [tiny_image("red")]}])
    learnt = batch["labels"][0] != -100
    text = re.sub(r"(<image>)+", "<image>", collator.tokenizer.decode(batch["input_ids"][0]))
    assert text == "<image><bos>What is it?\nIt is red.<eos>And then?\nIt is green.<eos>"
    assert collator.tokenizer.decode(batch["labels"][0][learnt]) == "It is red.<eos>It is green.<eos>"


def test_one_question_is_what_paligemma_makes_of_it_itself():
    record = {"id": "a", "messages": messages(TURNS[:1]), "images": [tiny_image("red")]}
    made, own = (
        VisionCollator(processors.paligemma(), chat_template=one)([record])
        for one in (chat_template("paligemma"), None)
    )
    for name in ("input_ids", "labels", "token_type_ids"):
        assert made[name].tolist() == own[name].tolist(), name


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"plain", "paligemma"}))
def test_what_an_answer_is_asked_for_with_is_how_a_turn_begins(name):
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=processors.tokenizer()._tokenizer, bos_token="<s>", eos_token="</s>"
    )
    turns = [{"role": "user", "content": [{"type": "text", "text": "q"}]}]
    answered = [*turns, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    options = {"chat_template": chat_template(name), "tokenize": False}
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options)
    assert tokenizer.apply_chat_template(answered, **options).startswith(asked)

"""Every source format trains, streamed or not, and labels are the assistant's turns in the processors of three families."""

import re

import datasets
import pytest
import torch
import transformers
from examples.tiny_vlm import IMAGE_SIZE, PATCH

from seecal import CALConfig, CALTrainer
from seecal.data.collators.vision import VisionCollator
from seecal.data.sources.mixture import mix
from tests.support.sources import RICH, SIMPLE, WRITERS, expected, llava_json, llava_jsonl, load, parquet
from tests.support.tiny import PLAIN_TEMPLATE, tiny_llava, tiny_llava_processor, tiny_tokenizer
from tests.trainer.test_trl_swap import EXAMPLES, run


def train(folder, data, **options):
    """The two steps' losses and the trained model."""
    args = CALConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        **options,
    )
    model = tiny_llava()
    trainer = CALTrainer(model, args, train_dataset=data, processing_class=tiny_llava_processor())
    trainer.train()
    assert trainer.state.global_step == 2
    return [one["loss"] for one in trainer.state.log_history if "loss" in one], model


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Losses over the same records with their images in memory, as a plain `datasets` set."""
    folder = tmp_path_factory.mktemp("reference")
    data = [{**one, "images": [str(path) for path in one["images"]]} for one in expected(folder, SIMPLE)]
    data = datasets.Dataset.from_list(data)
    data = data.cast_column("images", datasets.List(datasets.Image()))
    start = tiny_llava().state_dict()
    losses = {}
    for streaming in (False, True):
        losses[streaming], model = train(folder, data.to_iterable_dataset() if streaming else data)
        assert max((one - start[name]).abs().max() for name, one in model.state_dict().items()) > 1e-3
    return losses


@pytest.mark.parametrize("streaming", [False, True], ids=["file", "streaming"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_trains(tmp_path, reference, name, streaming):
    data = load(WRITERS[name], tmp_path, SIMPLE, streaming=streaming)
    streams = isinstance(data, datasets.IterableDataset)
    losses, _ = train(tmp_path / "out", data)
    assert losses == reference[streams]


@pytest.mark.parametrize("streaming", [False, True], ids=["file", "streaming"])
def test_a_mixture_trains(tmp_path, streaming):
    parts = {
        name: load(writer, tmp_path / name, RICH, streaming=streaming)
        for name, writer in (("a", llava_json), ("b", llava_jsonl), ("c", parquet))
    }
    losses, _ = train(tmp_path / "out", mix(parts, [3, 2, 1], seed=5))
    assert len(losses) == 2


def test_workers_read_their_share_of_a_stream(tmp_path):
    data = load(llava_jsonl, tmp_path, RICH * 3, streaming=True)
    losses, _ = train(tmp_path / "out", data, dataloader_num_workers=1)
    assert len(losses) == 2


# ---- Labels in the processors of three families ----

PINPOINTS = [[IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, IMAGE_SIZE]]
SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}


def llava_next_processor():
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=SIZE, image_grid_pinpoints=PINPOINTS
    )
    return transformers.LlavaNextProcessor(
        image_processor=images,
        tokenizer=tiny_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=PLAIN_TEMPLATE,
    )


def llava_onevision_processor():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<|start|>", "<video>"]})
    return transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=SIZE, image_grid_pinpoints=PINPOINTS),
        tokenizer=tokenizer,
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=SIZE),
        num_image_tokens=(IMAGE_SIZE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=PLAIN_TEMPLATE,
    )


PROCESSORS = {
    "llava": tiny_llava_processor,
    "llava_next": llava_next_processor,
    "llava_onevision": llava_onevision_processor,
}
# Multi-turn, several images, text only, each beside the others: short and long rows, so that there is padding.
CONTENT = [
    *RICH,
    (["blue"], [("a" * 40 + "<image>", "What colour is it?"), ("What colour is it?", "user\n"), ("b", "c c c")]),
    ([], [("a b c " * 5, "It is green. " * 9), ("b", "a")]),
]


@pytest.mark.parametrize("family", PROCESSORS)
@pytest.mark.parametrize("writer", [llava_json, parquet], ids=["paths", "bytes"])
def test_decoded_labels_are_the_assistants_turns(tmp_path, family, writer):
    collator = VisionCollator(PROCESSORS[family]())
    tokenizer = collator.tokenizer
    batch = collator(list(load(writer, tmp_path, CONTENT)))
    assert batch["input_ids"].shape[0] == len(CONTENT)
    image = tokenizer.convert_tokens_to_ids("<image>")
    for (colours, turns), labels, ids, mask in zip(
        CONTENT, batch["labels"], batch["input_ids"], batch["attention_mask"], strict=True
    ):
        placed = labels != -100
        assert torch.equal(labels[placed], ids[placed])
        assert mask[placed].all()
        starts = (placed.int().diff(prepend=torch.zeros(1, dtype=torch.int)) == 1).cumsum(0)
        decoded = [tokenizer.decode(labels[placed & (starts == turn + 1)]) for turn in range(int(starts.max()))]
        assert decoded == [f"{answer}<|end|>" for _, answer in turns]
        images = (ids == image).sum()
        assert bool(images) == bool(colours)
        assert images % max(1, len(colours)) == 0
        assert not (labels == image).any()
        # The prompt is whole, and what is no label is nothing but it: special tokens, questions, images, padding.
        unlabelled = tokenizer.decode(ids[~placed & mask.bool() & (ids != image)])
        question = "".join(f"<|start|>user\n{text}<|end|>\n<|start|>assistant\n\n" for text in _questions(turns))
        assert unlabelled == question


def _questions(turns):
    """The users' texts as the records hold them, without placeholders."""
    for text, _ in turns:
        pieces = text.split("<image>")
        if len(pieces) > 1 and not pieces[0].strip():
            pieces[:2] = [pieces[1].lstrip()]
        if len(pieces) > 1 and not pieces[-1].strip():
            pieces[-2:] = [pieces[-2].rstrip()]
        yield "".join(pieces)


def test_the_expected_questions():
    assert list(_questions([("<image>\nWhat?", ""), ("a <image> b\n<image>", ""), ("aa<image>", "")])) == [
        "What?",
        "a  b",
        "aa",
    ]


def test_the_example_of_a_mixture(tmp_path):
    lines = run(EXAMPLES / "mixture.py", "out", cwd=tmp_path).splitlines()
    assert lines[:2] == [
        "captions.csv: 40 records as captions, 0 left out",
        "questions.json: 80 records as llava, 1 left out",
    ]
    assert "record 'black-7' (entry 32): image 'black.png' is not in" in lines[2]
    shares = dict(re.findall(r"(\S+) (\d+)%", next(line for line in lines if line.startswith("mixture: "))))
    for name, share in (("captions.csv", 50), ("questions.json", 40), ("chat.jsonl", 10)):
        assert abs(int(shares[name]) - share) < 15
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", "\n".join(lines))]
    assert len(losses) == 2
    assert losses[1] < losses[0]

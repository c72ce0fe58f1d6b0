"""docs/families.md: its table says what the code says, its three examples run and are as short as promised."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from scripts.families_table import DIFFERENCE, PAGE, rows, with_table, written
from transformers import LlavaConfig, LlavaForConditionalGeneration

import seecal
from seecal import VisionCollator
from seecal.families.table import FAMILIES, GENERIC, family_of
from tests.families.test_sweep import step
from tests.support import processors, zoo, zoo_parts
from tests.support.tiny import tiny_llava, tiny_llava_processor, tiny_records
from tests.support.zoo_models import ZOO

TEXT = PAGE.read_text("utf8")
NEW_FAMILY, NEW_WEIGHTING, NEW_CONTRAST = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


class MyConfig(LlavaConfig):
    model_type = "my_vlm"
    logit_scale: float = 0.5


class MyModel(LlavaForConditionalGeneration):
    config_class = MyConfig

    def forward(self, input_ids=None, **inputs):
        output = super().forward(input_ids=input_ids, **inputs)
        output.logits = output.logits * self.config.logit_scale
        return output


def my_model():
    return MyModel(
        MyConfig(vision_config=zoo_parts.clip(), text_config=zoo_parts.llama(), image_token_index=zoo_parts.IMAGE)
    )


def test_minigemini_as_the_page_builds_it():
    (block,) = re.findall(r"```pycon\n(.*?)```", TEXT, re.DOTALL)
    made = {
        "language_model": SimpleNamespace(config=zoo_parts.llama()),
        "tokenizer": processors.mgm().tokenizer,
        "template": "{{ messages }}",
    }
    exec("\n".join(line.removeprefix(">>> ") for line in block.strip().splitlines()), made)
    processor, config = made["processor"], made["config"]
    assert processor.image_seq_length == config.image_seq_length == 2880
    pixels = processor(text=["<image>"], images=[[Image.new("RGB", (30, 20))]], return_tensors="pt")
    assert pixels["pixel_values"].shape == (1, config.pictures, 3, 336, 336)
    assert pixels["pixel_values_aux"].shape == (1, 3, config.image_size_aux, config.image_size_aux)


@pytest.fixture
def tables(monkeypatch):
    """The tables as they were, once the test is over; and the made-up family among the kinds of model."""
    before = [(table, dict(table)) for table in (FAMILIES, seecal.WEIGHTINGS, seecal.CONTRASTS)]
    monkeypatch.setitem(ZOO, "my_vlm", zoo_parts.Kind(my_model, [zoo_parts.IMAGE] * 16, zoo_parts.picture))
    yield
    for table, entries in before:
        table.clear()
        table.update(entries)


def test_the_table_says_what_the_code_says():
    page = written(TEXT)
    assert [row[:DIFFERENCE] + row[DIFFERENCE + 1 :] for row in page] == rows(list(ZOO)), (
        "docs/families.md is out of date: python -m scripts.families_table"
    )
    exact = {row[0]: float(row[DIFFERENCE]) for row in page if row[2] == "yes"}
    assert {name.split(",")[0] for name in exact} == {name for name, family in FAMILIES.items() if family.exact}
    assert max(exact.values()) <= 2e-5


def test_writing_the_table_again_changes_nothing():
    assert with_table(TEXT, written(TEXT)) == TEXT


def test_the_examples_are_short():
    assert len(NEW_FAMILY.splitlines()) < 15
    assert len(NEW_WEIGHTING.splitlines()) < 10
    assert len(NEW_CONTRAST.splitlines()) < 12


def test_a_new_family_is_one_row(tables, monkeypatch):
    model = zoo.model_of("my_vlm", "sdpa")
    assert family_of(model) is GENERIC
    with pytest.raises(ValueError, match=r"my_vlm.*scales, caps or shifts.*head="):  # the generic row has no factor
        zoo.measure("my_vlm", "sdpa", "right")

    exec(NEW_FAMILY, {})
    routes, own = zoo.measure("my_vlm", "sdpa", "right")
    assert list(routes) == list(zoo.ROUTES)
    for got in routes.values():
        torch.testing.assert_close(got.logit_with, own.with_image, atol=own.tolerance, rtol=0)
        torch.testing.assert_close(got.delta, own.delta, atol=own.tolerance, rtol=0)

    monkeypatch.setattr("seecal.core.forward.world_size", lambda: 2)
    _, gradients = step(model, zoo.batch_of("my_vlm", zoo.TEXT_ONLY))
    assert any("vision_tower" in name for name in gradients)


def test_a_new_weighting_is_one_entry(tables):
    model, batch = zoo.model_of("llava", "sdpa"), zoo.batch_of("llava", zoo.MIXED)
    exec(NEW_WEIGHTING, {"model": model})
    try:
        record = model.train()(**batch).cal
    finally:
        seecal.disable_cal(model.eval())
    assert torch.equal(record.weights, (record.visual_delta.delta > 0).float())
    assert 0 < int(record.weight_sum) < len(record.weights)


def test_a_new_contrast_is_one_entry(tables):
    exec(NEW_CONTRAST, {})
    records = [{**record, "id": str(row)} for row, record in enumerate(tiny_records(3))]
    processor = tiny_llava_processor()
    batch = dict(VisionCollator(processor, contrast="grey", strength=1.0)(records))
    grey = processor.image_processor([Image.new("RGB", (8, 8), (127, 127, 127))], return_tensors="pt")["pixel_values"][
        0
    ]
    assert all(torch.equal(pixels, grey) for pixels in batch["contrast_pixel_values"])
    delta = seecal.visual_delta(tiny_llava(), batch, contrast="grey")
    assert delta.has_contrast.any()
    assert float(delta.delta.abs().max()) > 0
    with pytest.raises(ValueError, match=r"contrast_strength=2.*at most 1 \(share of grey\)"):
        seecal.CALOptions(contrast="grey", contrast_strength=2)


def test_a_contrast_that_changes_the_size_is_refused(tables):
    seecal.CONTRASTS["half"] = seecal.Contrast(
        "half", lambda image, strength, rng, others: image.resize((4, 4)), on_pixels=True
    )
    with pytest.raises(ValueError, match=r"contrast=.half. made an image of .*must keep the size"):
        VisionCollator(tiny_llava_processor(), contrast="half")(tiny_records(2))


def test_the_table_of_contrasts_says_what_the_code_says():
    lines = TEXT[TEXT.index("| contrast | what it does to the image |") :].splitlines()[2:]
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert found == [
        [
            f"`{name}`",
            contrast.help,
            "yes" if contrast.on_pixels else "no",
            contrast.unit or "none",
            "" if contrast.strength is None else f"{contrast.strength:g}",
        ]
        for name, contrast in seecal.CONTRASTS.items()
    ]


def test_the_help_names_every_weighting_and_contrast():
    helps = {field.name: field.metadata["help"] for field in dataclasses.fields(seecal.CALOptions)}
    assert all(name in helps["weighting"] for name in seecal.WEIGHTINGS)
    assert all(name in helps["contrast"] for name in seecal.CONTRASTS)


def test_the_table_of_weightings_says_what_the_code_says():
    lines = TEXT[TEXT.index("| weighting | weight of a label token |") :].split("\n\n")[0].splitlines()[2:]
    found = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    expected = [
        [f"`{name}`", one.source, ", ".join(one.passes) or "none", "yes" if one.needs_logprob else "no"]
        for name, one in seecal.WEIGHTINGS.items()
    ]
    assert [[name, *rest] for name, _, *rest in found] == expected
    assert all(formula for _, formula, *_ in found)

"""seecal.merge, and that a folder is checked before it is called done."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
from typer.testing import CliRunner

import seecal
from seecal.cli.main import app
from seecal.families.synthetic_batch import synthetic_batch
from seecal.models import export
from seecal.models.loading import load_vlm
from tests.support.tiny import tiny_llava, tiny_llava_processor


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with base/ and adapter/, a trained LoRA on it."""
    folder = tmp_path_factory.mktemp("merge")
    model = tiny_llava()
    model.save_pretrained(folder / "base")
    tiny_llava_processor().save_pretrained(folder / "base")
    model = AutoModelForImageTextToText.from_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(0)
    for name, one in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(one, std=0.3)
    adapted.save_pretrained(folder / "adapter")
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(**synthetic_batch(model)).logits


def test_the_merged_model_computes_what_the_adapter_does(place, tmp_path):
    saved = seecal.merge(place / "adapter", tmp_path / "out")
    base = AutoModelForImageTextToText.from_pretrained(place / "base")
    before = logits(base)
    adapted = PeftModel.from_pretrained(base, place / "adapter")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    expected = adapted.eval()(**synthetic_batch(merged)).logits
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=0)
    assert (expected - before).abs().max() > 0.1, "the adapter does something"
    assert 0 < saved.moved < 1e-5
    assert AutoProcessor.from_pretrained(tmp_path / "out").chat_template
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """The folder of a model whose head is its word table."""
    folder = tmp_path_factory.mktemp("tied")
    config = tiny_llava().config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tiny_llava_processor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "still"),
    [
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
        ({"target_modules": ["lm_head"]}, False),
        ({"target_modules": ["embed_tokens"]}, False),
        ({"target_modules": ["lm_head", "embed_tokens"]}, False),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 6]}}, True),
    ],
    ids=lambda value: str(value),
)
def test_an_adapter_on_a_tied_head_or_word_table(settings, still, tied, tmp_path):
    """They are two matrices from then on, and the config that is written says so, or the head would be lost on loading."""
    base = AutoModelForImageTextToText.from_pretrained(tied)
    assert base.lm_head.weight is base.get_input_embeddings().weight
    before = logits(base)
    adapted = get_peft_model(base, LoraConfig(r=2, **settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for one in adapted.parameters():
            if one.requires_grad:
                one.add_(torch.randn_like(one), alpha=0.3)
    expected = adapted.eval()(**synthetic_batch(base)).logits
    assert (expected - before).abs().max() > 0.01, "the adapter does something"
    adapted.save_pretrained(tmp_path / "adapter")
    seecal.merge(tmp_path / "adapter", tmp_path / "out")
    merged, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=0)
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == still
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [part["tie_word_embeddings"] for part in (written, written["text_config"])] == [still, still]
    loaded, _ = load_vlm(str(tmp_path / "adapter"), processor=False)
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4", "lora_ga", "corda"])
def test_an_adapter_that_changed_the_weights_it_started_from(start, place, tmp_path):
    """PEFT changes them again on loading, the same way where they alone decide how; else no model is the adapter's."""
    base = AutoModelForImageTextToText.from_pretrained(place / "base")
    made = (
        "pissa_niter_4" if start == "corda" else start
    )  # corda needs data, and its config says the same of an adapter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=made))
    for name, one in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(one, std=0.3)
    expected = adapted.eval()(**synthetic_batch(base)).logits
    adapted.save_pretrained(tmp_path / "adapter")
    setting(tmp_path / "adapter" / "adapter_config.json", init_lora_weights=start)
    if start in ("pissa", "olora"):
        seecal.merge(tmp_path / "adapter", tmp_path / "out")
        merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=0)
        return
    for given in (None, str(place / "base")):
        with pytest.raises(ValueError, match=rf"adapter_config.json: init_lora_weights is '{start}'"):
            seecal.merge(tmp_path / "adapter", tmp_path / "out", base=given)


def test_another_base_and_precision(place, tmp_path):
    base = AutoModelForImageTextToText.from_pretrained(place / "base")
    with torch.no_grad():
        base.lm_head.weight.mul_(2)
    base.save_pretrained(tmp_path / "base")
    AutoProcessor.from_pretrained(place / "base").save_pretrained(tmp_path / "base")
    saved = seecal.merge(place / "adapter", tmp_path / "out", base=str(tmp_path / "base"), dtype="bfloat16")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged.lm_head.weight, base.lm_head.weight.bfloat16())
    assert saved.moved < 6e-2


def test_a_merge_that_computes_something_else_is_refused(place, tmp_path, monkeypatch):
    whole = LoraModel.merge_and_unload

    def spoiled(self, *args, **options):
        merged = whole(self, *args, **options)
        with torch.no_grad():
            merged.lm_head.weight[3] += 0.1
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", spoiled)
    with pytest.raises(ValueError, match="merged, its logits differ"):
        seecal.merge(place / "adapter", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


SPOILED = {
    "weights": (
        lambda part: change(part, lambda held: held["language_model.lm_head.weight"][3].add_(0.1)),
        "logits differ",
    ),
    "a tensor lost": (
        lambda part: change(part, lambda held: held.pop("language_model.model.norm.weight")),
        "norm.weight",
    ),
    "a tensor too many": (lambda part: change(part, lambda held: held.update(odd=torch.ones(2))), "odd"),
    "template": (lambda part: (part / "chat_template.jinja").write_text("{{ messages }}"), "another chat template"),
    "processor": (lambda part: setting(part / "processor_config.json", patch_size=3), "has other settings"),
    "tokenizer": (lambda part: token(part / "tokenizer.json"), "another vocabulary"),
}


def change(part, how):
    held = load_file(part / "model.safetensors")
    how(held)
    save_file(held, part / "model.safetensors", metadata={"format": "pt"})


def setting(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def token(path):
    whole = json.loads(path.read_text())
    whole["added_tokens"][-1]["content"] += "x"
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize("what", SPOILED)
def test_a_folder_that_is_not_what_was_saved_is_refused(what, place, tmp_path, monkeypatch):
    spoil, said = SPOILED[what]
    save = export.save_processor

    def spoiled(processor, folder):
        save(processor, folder)
        spoil(folder)

    monkeypatch.setattr(export, "save_processor", spoiled)
    with pytest.raises(ValueError, match=said):
        seecal.merge(place / "adapter", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("adapter", "out", "said"),
    [
        ("base", "out", "no adapter here"),
        ("nowhere", "out", "no adapter here"),
        ("adapter", "full", "it holds files already"),
        ("adapter", "a file", "this is a file"),
    ],
)
def test_what_is_asked_wrongly_is_told(adapter, out, said, place, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "a file").write_text("mine")
    with pytest.raises(ValueError, match=said):
        seecal.merge(place / adapter, tmp_path / out)
    assert (tmp_path / "full" / "notes.txt").read_text() == (tmp_path / "a file").read_text() == "mine"


def test_overwriting_takes_models_alone(place, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no model that could be overwritten"):
        seecal.merge(place / "adapter", tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "config.json").write_text("{}")
    seecal.merge(place / "adapter", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "notes.txt").exists()
    with pytest.raises(ValueError, match="is what is read"):
        seecal.merge(place / "adapter", place / "adapter", overwrite=True)


def test_the_command(place, tmp_path):
    done = CliRunner().invoke(app, ["merge", str(place / "adapter"), str(tmp_path / "out")], catch_exceptions=False)
    assert "merging moved the logits by" in done.output

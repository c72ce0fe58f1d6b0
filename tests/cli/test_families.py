"""seecal families: the table on one screen, and the verdict on checkpoint folders of every kind."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

from seecal.cli import families as family_check
from seecal.families.table import FAMILIES
from seecal.models.loading import load_vlm
from tests.support.processes import environment, limit
from tests.support.zoo import model_of


def seecal(*args):
    return subprocess.run(
        [sys.executable, "-m", "seecal", *map(str, args)],
        capture_output=True,
        text=True,
        env=environment(COLUMNS="120"),
        timeout=limit(2),
        check=False,
    )


def test_the_table_names_every_family():
    done = seecal("families")
    assert done.returncode == 0, done.stderr
    assert all(f" {name} " in done.stdout for name in FAMILIES)
    assert max(map(len, done.stdout.splitlines())) <= 120


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_verdict_on_a_checkpoint_folder(name, tmp_path):
    model_of(name).save_pretrained(tmp_path)
    model, processor = load_vlm(str(tmp_path), processor=False)
    assert processor is None
    verdict, lines = family_check.check(model)
    assert not verdict.leaks
    # with cross-attention both contrasts leave the image out, so they agree
    assert verdict.exact is (FAMILIES[name].exact or FAMILIES[name].cross_attention)
    assert lines.startswith(f"{name}: declared")


class UnheardOfConfig(LlavaConfig):
    model_type = "unheard_of_vlm"


class UnheardOf(LlavaForConditionalGeneration):
    config_class = UnheardOfConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.language_model.forward = self._leaky(self.model.language_model.forward)

    def _leaky(self, plain):
        def forward(*args, **kwargs):
            return plain(*args, **kwargs)

        return forward


class Leaky(UnheardOf):
    """Remembers the pixels beside the text: what the decoder puts out carries them, whatever its input."""

    def _leaky(self, plain):
        def forward(*args, **kwargs):
            output = plain(*args, **kwargs)
            output.last_hidden_state = output.last_hidden_state + self.model.seen
            return output

        def note(module, args, kwargs):
            if kwargs.get("pixel_values") is not None:
                module.seen = kwargs["pixel_values"].mean()

        self.model.seen = torch.zeros(())
        self.model.register_forward_pre_hook(note, with_kwargs=True)
        return forward


@pytest.mark.parametrize(("cls", "expected"), [(UnheardOf, "CAL is exact"), (Leaky, "still changes with the pixels")])
def test_the_verdict_on_a_family_it_has_never_heard_of(cls, expected, tmp_path):
    AutoConfig.register("unheard_of_vlm", UnheardOfConfig, exist_ok=True)
    AutoModelForImageTextToText.register(UnheardOfConfig, cls, exist_ok=True)
    plain = model_of("llava")
    config = UnheardOfConfig(**{key: value for key, value in plain.config.to_dict().items() if key != "model_type"})
    model = cls(config)
    model.load_state_dict(plain.state_dict())
    model.save_pretrained(tmp_path)
    loaded, _ = load_vlm(str(tmp_path), processor=False)
    assert type(loaded) is cls
    verdict, lines = family_check.check(loaded)
    assert "not declared" in lines
    assert expected in lines
    assert verdict.leaks is (cls is Leaky)


def test_the_command_on_a_folder(tmp_path):
    model_of("llava").save_pretrained(tmp_path)
    done = seecal("families", "--check", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("llava: declared exact. On this checkpoint dropping the image equals masking it")
    done = seecal("families", "--check", tmp_path / "none")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no such folder" in done.stderr


def test_weights_that_are_cut_off_are_one_line(tmp_path):
    model_of("llava").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:999])
    with pytest.raises(ValueError, match="its weights are cut off or damaged"):
        load_vlm(str(tmp_path), processor=False)

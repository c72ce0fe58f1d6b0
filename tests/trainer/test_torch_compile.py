"""torch_compile: the decoder's layers are compiled once for all lengths, and train as uncompiled ones do."""

import logging
import shutil

import pytest
import torch
from transformers import TrainerCallback

from seecal import CALConfig, CALTrainer
from seecal.core.decoder import compile_layers
from seecal.families.table import decoder_of
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor

# Padded rows that happen to be of one length need no mask, which is a graph of its own: in the first three batches of
# 32 records there is one with and one without.
# Packed rows: of 11 records the fourth batch has two, so that it has other segments.
STEPS = 7


class NothingAnew(TrainerCallback):
    """From the fourth batch on, what would be compiled once more is an error. Counts graphs before."""

    graphs = 0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            torch._dynamo.config.error_on_recompile = True


def train(folder, callbacks=(), **changes):
    settings = {
        "per_device_train_batch_size": 3,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
    }
    trainer = CALTrainer(
        tiny_llava(),
        CALConfig(str(folder), **{**settings, **changes}),
        train_dataset=tiny_dataset(11 if changes["padding_free"] else 32),
        processing_class=tiny_llava_processor(),
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.config.error_on_recompile = False
    torch._dynamo.reset()


# Backend "eager" runs what was captured as it is: what is compiled anew, and when, is the same for every backend
def agree(folder, backend, **changes):
    watch = NothingAnew()
    trainer, compiled = train(folder, [watch], torch_compile=True, torch_compile_backend=backend, **changes)
    plain, expected = train(folder, **changes)
    assert compiled == pytest.approx(expected, rel=1e-4)
    assert len(compiled) == STEPS
    assert watch.graphs > 0
    assert watch.graphs == torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert list(trainer.model.state_dict()) == list(plain.model.state_dict())
    assert all(layer._compiled_call_impl is not None for layer in decoder_of(trainer.model).layers)


@pytest.mark.parametrize("changes", [{"padding_free": True}, {"padding_free": False}], ids=["packed", "padded"])
def test_compiled_and_eager_agree_and_nothing_is_compiled_after_the_third_batch(tmp_path, fresh, changes):
    agree(tmp_path, "eager", **changes)


def test_padded_rows_are_compiled_under_checkpointing(tmp_path, fresh, caplog):
    with caplog.at_level(logging.WARNING):
        agree(tmp_path, "eager", padding_free=False, gradient_checkpointing=True)
    assert "run uncompiled on packed rows" not in caplog.text


def test_packed_rows_under_checkpointing_run_uncompiled_and_that_is_said(tmp_path, fresh, caplog):
    with caplog.at_level(logging.WARNING):
        settings = {"weighting": "uniform", "padding_free": True, "gradient_checkpointing": True, "max_steps": 2}
        train(tmp_path, torch_compile=True, torch_compile_backend="eager", **settings)
    assert "layers run uncompiled on packed rows" in caplog.text
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ for the CPU: no g++ here")
@pytest.mark.parametrize("padding_free", [True, False], ids=["packed", "padded"])
def test_the_default_backend(tmp_path, fresh, padding_free):
    agree(tmp_path, "inductor", padding_free=padding_free)


def test_a_decoder_without_layers_is_refused():
    model = tiny_llava()
    decoder = decoder_of(model)
    decoder.blocks = decoder.layers
    del decoder.layers
    with pytest.raises(ValueError, match="decoder of LlavaForConditionalGeneration has no list of layers"):
        compile_layers(model)

"""What training leaves on the disk, loaded by plain transformers in another process, offline: the same logits.

Whole models, adapters, adapters on a model in 4 bits, and both of these merged, of three families.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from seecal import CALConfig, CALTrainer
from seecal.data.collators.vision import VisionCollator
from seecal.models.loading import merge
from seecal.models.quantised import beside_the_decoder, four_bit_layers
from tests.support.processes import limit
from tests.support.raw_data import dataset, layers_of, model_of, processor_of, records

FAMILIES = ["llava", "qwen2_5_vl", "smolvlm"]
KINDS = ["full", "LoRA", *(["QLoRA"] if find_spec("bitsandbytes") else [])]  # make test-oldest is without
PLAIN = Path(__file__).parents[1] / "support" / "plain_reload.py"


def quantization(model):
    """All that is a multiple of 64 wide, which on the CPU it has to be."""
    skipped = [*beside_the_decoder(model), "down_proj"]
    return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": skipped}


def trainer_of(family, kind, base, out):
    model = model_of(family)
    model.save_pretrained(base)
    init = {"dtype": torch.float32}
    if kind == "QLoRA":
        init |= {"quantization_config": BitsAndBytesConfig(**quantization(model)), "device_map": {"": "cpu"}}
    lora = LoraConfig(r=2, target_modules=layers_of(model)) if kind != "full" else None
    model = type(model).from_pretrained(base, **init)
    if kind == "full":
        for name, one in model.named_parameters():
            one.requires_grad_("vision" not in name and "visual" not in name)
    config = CALConfig(
        str(out),
        per_device_train_batch_size=3,
        max_steps=2,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        max_length=None,
        train_sampling_strategy="sequential",
    )
    processor = processor_of(family)
    return CALTrainer(model, config, train_dataset=dataset(family), processing_class=processor, peft_config=lora), init


def tensors_of(model):
    """Every parameter, and of those in 4 bits their scales too."""
    found = {name: one.detach().clone() for name, one in model.named_parameters()}
    scales = {
        f"{name}.absmax": layer.weight.quant_state.absmax.clone() for name, layer in four_bit_layers(model).items()
    }
    return {**found, **scales}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """{(family, kind): (before, after, which train, the logits, those of the reloaded, those of the merged)}."""
    folder, found, jobs = tmp_path_factory.mktemp("reload"), {}, []
    for family in FAMILIES:
        batch = dict(VisionCollator(processor_of(family))(records(family)[:2]))
        batch.pop("labels")
        batch = {name: one for name, one in batch.items() if isinstance(one, torch.Tensor) and name != "long_records"}
        save_file({name: one.contiguous() for name, one in batch.items()}, folder / f"{family}.batch")
        for kind in KINDS:
            base, out = folder / family / "base", folder / family / kind
            trainer, init = trainer_of(family, kind, base, out)
            before = tensors_of(trainer.model)
            trainer.train()
            after = tensors_of(trainer.model)
            trains = {name for name, one in trainer.model.named_parameters() if one.requires_grad}
            with torch.no_grad():
                logits = trainer.model.eval()(**batch).logits
            trainer.save_model()
            job = {"model": str(base), "adapter": str(out), "batch": str(folder / f"{family}.batch")}
            job["quantization"] = quantization(model_of(family)) if kind == "QLoRA" else None
            if kind == "full":
                job |= {"model": str(out), "adapter": None}
            jobs.append({**job, "logits": str(out / "plain")})
            if kind != "full":
                merge(str(base), out, **init).save_pretrained(out / "merged")
                merged = {"model": str(out / "merged"), "adapter": None, "quantization": None}
                jobs.append({**job, **merged, "logits": str(out / "merged" / "plain")})
            found[family, kind] = before, after, trains, logits, out
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, str(PLAIN), str(folder / "jobs.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit(), cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return found


EVERY = [(family, kind) for family in FAMILIES for kind in KINDS]


@pytest.mark.parametrize("case", EVERY, ids=" ".join)
def test_plain_transformers_computes_the_same_logits(cases, case):
    *_, logits, out = cases[case]
    torch.testing.assert_close(load_file(out / "plain")["logits"], logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", [case for case in EVERY if case[1] != "full"], ids=" ".join)
def test_the_merged_model_computes_what_the_adapter_does(cases, case):
    *_, logits, out = cases[case]
    torch.testing.assert_close(load_file(out / "merged" / "plain")["logits"], logits, atol=1e-4, rtol=0)
    if case[1] == "QLoRA":
        assert not (out / "merged" / "config.json").read_text().count("quantization_config")


@pytest.mark.parametrize("case", EVERY, ids=" ".join)
def test_what_trains_has_changed_and_nothing_else(cases, case):
    before, after, trains, *_ = cases[case]
    assert 0 < len(trains) < len(before)
    assert {name for name, one in before.items() if not torch.equal(one, after[name])} == trains
    if case[1] == "QLoRA":
        assert sum(name.endswith(".absmax") for name in before) > 0

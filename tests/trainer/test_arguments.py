"""What CALTrainer is constructed with: configs of TRL and transformers, and what is refused by name before any step."""

import dataclasses
import inspect
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from trl import SFTConfig, SFTTrainer, TrlParser

from seecal import CALConfig, CALTrainer
from seecal.trainer import arguments
from seecal.trainer.arguments import cal_config, check_reporting, refuse_other_losses
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor, tiny_records

BASE = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


def trainer(folder, model=None, *, kind=CALTrainer, **changes):
    given = {name: changes.pop(name) for name in ("args", "peft_config", "data_collator") if name in changes}
    args = given.pop("args", None) or sgd_config(folder, 4, changes.pop("accumulation", 1), max_steps=1, **changes)
    return kind(
        tiny_llava() if model is None else model,
        args,
        train_dataset=tiny_dataset(8),
        processing_class=tiny_llava_processor(),
        **given,
    )


# ---- Configs ----

SET = {
    SFTConfig: {"max_length": 300, "eos_token": "<|end|>", "learning_rate": 3e-4, "dataset_kwargs": {"a": 1}},
    TrainingArguments: {"learning_rate": 4e-4, "gradient_accumulation_steps": 3, "hub_token": "secret"},
    Seq2SeqTrainingArguments: {"warmup_steps": 7, "lr_scheduler_type": "cosine"},
}


@pytest.mark.parametrize("kind", SET)
def test_other_configs_become_ours(tmp_path, kind):
    theirs = kind(str(tmp_path), **BASE, **SET[kind])
    made = cal_config(theirs, None)
    assert type(made) is CALConfig
    for field in dataclasses.fields(theirs):
        changed = ("padding_free", "logging_nan_inf_filter", "_n_gpu", "distributed_state", "deepspeed_plugin")
        if field.init and field.name not in changed and hasattr(made, field.name):
            assert getattr(made, field.name) == getattr(theirs, field.name), field.name
    assert made.cal_options() == CALConfig(str(tmp_path), **BASE).cal_options(), "CAL's own are the defaults"
    assert made.padding_free == "auto"
    assert cal_config(made, None) is made


def test_without_a_config_the_folder_is_called_after_the_model(monkeypatch):
    monkeypatch.setattr(arguments, "CALConfig", lambda folder: folder)  # the default is bf16, which needs a GPU
    assert cal_config(None, tiny_llava()) == "CAL"
    assert cal_config(None, "llava-hf/llava-1.5-7b-hf/") == "llava-1.5-7b-hf-CAL"


def test_what_cal_does_otherwise_is_not_copied_and_what_it_lacks_is_told(tmp_path):
    assert cal_config(SFTConfig(str(tmp_path), **BASE, padding_free=True), None).padding_free is True
    lost = Seq2SeqTrainingArguments(str(tmp_path), **BASE, predict_with_generate=True)
    with pytest.raises(ValueError, match=r"Seq2SeqTrainingArguments with predict_with_generate=True.*seecal.CALConfig"):
        cal_config(lost, None)
    with pytest.raises(ValueError, match="use_liger_kernel=True"):
        cal_config(SFTConfig(str(tmp_path), **BASE, use_liger_kernel=True), None)


@pytest.mark.parametrize("kind", [SFTConfig, TrainingArguments])
def test_a_script_with_the_old_config_trains(tmp_path, kind):
    this = trainer(tmp_path, args=kind(str(tmp_path), **BASE, max_steps=1, logging_steps=1))
    this.train()
    assert "delta_mean" in this.state.log_history[0]
    assert isinstance(this.args, CALConfig)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("--padding_free", True), ("--padding_free --beta 3", True), ("--padding_free auto", "auto"), ("", "auto")],
)
def test_padding_free_as_a_bare_flag(tmp_path, flags, expected):
    line = f"--output_dir {tmp_path} --bf16 false --use_cpu true {flags}"
    (config,) = TrlParser([CALConfig]).parse_args_and_config(line.split())
    assert config.padding_free == expected


def test_the_signature_names_what_sft_trainer_names():
    ours, theirs = (inspect.signature(kind.__init__).parameters for kind in (CALTrainer, SFTTrainer))
    assert list(ours) == list(theirs)
    assert not {parameter.kind for parameter in ours.values()} & {
        inspect.Parameter.VAR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    }


# ---- What is refused ----

VIRTUAL = {
    "PromptTuningConfig": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "PrefixTuningConfig": PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "PromptEncoderConfig": PromptEncoderConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", encoder_hidden_size=8),
}


@pytest.mark.parametrize("name", VIRTUAL)
@pytest.mark.parametrize("before", [False, True], ids=["peft_config", "on the model"])
def test_adapters_with_virtual_tokens_are_refused_by_name(tmp_path, name, before):
    given = {}
    model = tiny_llava()
    if before:
        model = PeftModel(model, LoraConfig(target_modules=["q_proj"]))
        model.peft_config["other"] = VIRTUAL[name]
    else:
        given["peft_config"] = VIRTUAL[name]
    with pytest.raises(ValueError, match=rf"^{name}: virtual tokens stand before the text.*peft\.LoraConfig"):
        trainer(tmp_path, model, **given)


@pytest.mark.parametrize("name", ["tensorboard", "comet_ml", "mlflow"])
def test_a_logger_that_is_not_installed_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr(arguments, "get_available_reporting_integrations", lambda: ["wandb"])
    with pytest.raises(
        ValueError, match=rf"^report_to='{name}': .* pip install {name[:5]}.*report_to='none'".replace(" pip", ".*pip")
    ):
        trainer(tmp_path, report_to=["wandb", name])
    check_reporting(CALConfig(str(tmp_path), **{**BASE, "report_to": ["wandb"]}))


@pytest.mark.parametrize("packing", ["packing", "eval_packing"])
def test_packing_says_why_for_text_too(tmp_path, packing):
    with pytest.raises(ValueError, match=f"^{packing}=True: .*text-only batches too"):
        CALConfig(str(tmp_path), **BASE, **{packing: True})


@pytest.mark.parametrize("added", [1, 300])
def test_token_ids_beyond_the_embedding_table_are_told_before_the_first_step(tmp_path, added):
    processor, model = tiny_llava_processor(), tiny_llava()
    rows = model.get_input_embeddings().num_embeddings
    room = rows - 1 - max(processor.tokenizer.get_vocab().values())
    processor.tokenizer.add_tokens([f"<new{number}>" for number in range(room)])
    given = {"args": sgd_config(tmp_path, 4, 1), "train_dataset": tiny_dataset(4), "processing_class": processor}
    CALTrainer(tiny_llava(), **given)
    processor.tokenizer.add_tokens([f"<beyond{number}>" for number in range(added)])
    message = (
        rf"tokenizer has {added} ids that the model's embedding table of {rows} rows.*embeddings\({rows + added}\)"
    )
    with pytest.raises(ValueError, match=message):
        CALTrainer(model, **given)
    model.resize_token_embeddings(rows + added)
    CALTrainer(model, **given)


@pytest.mark.parametrize("kind", ["tp", "cp", "sp"])
def test_rows_that_are_split_over_ranks_are_refused(kind):
    parallelism = SimpleNamespace(**{"tp_size": 1, "cp_size": 1, "sp_size": 1, f"{kind}_size": 2})
    with pytest.raises(ValueError, match=rf"parallelism_config with .*'{kind}': 2.*: CAL needs whole rows"):
        refuse_other_losses(None, parallelism)
    refuse_other_losses(None, SimpleNamespace(tp_size=1, cp_size=1, sp_size=1))
    refuse_other_losses(None, None)


# ---- Subclasses ----


class Other(CALTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        return model(**batch, use_cache=False).loss


class OtherStep(CALTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss * 0)
        self._step.clear()
        return loss.detach()


class Ours(CALTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (loss * 1, outputs) if return_outputs else loss * 1


@pytest.mark.parametrize("normalize", ["global", "micro_batch", "sample"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_of_a_subclass_that_is_not_cals(tmp_path, normalize, accumulation):
    model = tiny_llava()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    changes = {"normalize": normalize, "accumulation": accumulation}
    with pytest.raises(ValueError, match=r"^Other\.compute_loss did not call CALTrainer's.*super\(\)\.compute_loss"):
        trainer(tmp_path, model, kind=Other, **changes).train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    trainer(tmp_path, kind=Ours, **changes).train()


def test_a_step_of_a_subclass_that_is_not_cals(tmp_path):
    with pytest.raises(ValueError, match=r"^OtherStep\.training_step did not call CALTrainer's"):
        trainer(tmp_path, kind=OtherStep).train()


# ---- A model that trained before ----


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "LoRA"])
def test_after_a_plain_training_in_mixed_precision(tmp_path, lora):
    """accelerate leaves its wrapper on the model's forward, and CAL would stay outside of it."""
    model = tiny_llava()
    if lora:
        model = PeftModel(model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    settings = {**BASE, "bf16": True, "max_steps": 1, "logging_steps": 1, "learning_rate": 0.0}
    given = {"train_dataset": tiny_dataset(8), "processing_class": tiny_llava_processor()}
    SFTTrainer(model, SFTConfig(str(tmp_path), **settings), **given).train()
    seen = {}

    def deltas_of(name, model):
        """Δ of one step, and the precision that its layers compute in."""

        class Seen(CALTrainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
                if "cal" in outputs:
                    seen[name] = outputs.cal.visual_delta.delta
                return (loss, outputs) if return_outputs else loss

        layer = dict(model.named_modules())
        (gate,) = (module for path, module in layer.items() if path.endswith("language_model.layers.0.mlp.gate_proj"))
        dtypes = set()
        hook = gate.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
        this = Seen(model, CALConfig(str(tmp_path), **settings), **given)
        this.train()
        hook.remove()
        assert dtypes == {torch.bfloat16}
        assert this.evaluate(tiny_records(3))["eval_label_tokens"] > 0

    for name in ("after SFTTrainer", "after CALTrainer"):
        deltas_of(name, model)
    fresh = tiny_llava()
    deltas_of("alone", PeftModel(fresh, LoraConfig(r=2, target_modules=r".*language_model.*q_proj")) if lora else fresh)
    assert torch.equal(seen["after SFTTrainer"], seen["alone"])
    assert torch.equal(seen["after CALTrainer"], seen["alone"])

"""enable_cal where somebody else calls the forward: transformers' own Trainer, caches, pickling, wrappers."""

import copy
import io
import pickle

import peft
import pytest
import torch
from accelerate import cpu_offload
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import DynamicCache, Trainer, TrainingArguments
from trl.trainer.utils import add_fused_lm_head

import seecal
from seecal import CALOptions
from tests.support.builders import Row, batch_of, build

# Answers of different lengths: means over micro-batches, unweighted, would show
ROWS = [
    Row([2, "image", 3, -9]), Row([4, "image", 2, -3]), Row([2, "image", 3, -7]), Row([4, "image", 2, -5]),
]  # fmt: skip
for _index, _row in enumerate(ROWS):
    _row.key = _index
OPTIONS = {
    "uniform": CALOptions(weighting="uniform"),
    "global": CALOptions(),
    "tokens": CALOptions(normalize="tokens"),
    "sample": CALOptions(normalize="sample"),
    "micro_batch": CALOptions(normalize="micro_batch"),
}


@pytest.fixture(scope="module")
def fresh():
    """As it was built: a model that has run carries hooks of transformers that do not pickle."""
    return build("llava")


def lora(model):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)
    return peft.get_peft_model(model, config)


def trainer(folder, model, collate, batch_size, accumulation, **changes):
    settings = {
        "optim": "sgd",
        "learning_rate": 0.01,
        "max_grad_norm": 0,
        "lr_scheduler_type": "constant",
        "max_steps": 1,
    }
    settings |= {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "use_cpu": True,
    }
    settings |= {"save_strategy": "no", "report_to": "none", "remove_unused_columns": False, "disable_tqdm": True}
    args = TrainingArguments(str(folder), train_sampling_strategy="sequential", **{**settings, **changes})
    return Trainer(model, args, data_collator=collate, train_dataset=list(range(len(ROWS))))


def update(folder, fresh, options, batch_size, accumulation, *, adapters=False, late=False, **changes):
    """What one step of the stock Trainer adds to each weight."""
    model, image_tokens, pixels = copy.deepcopy(fresh[0]), *fresh[1:]
    trained = lora(model) if adapters else model
    before = {name: value.detach().clone() for name, value in trained.named_parameters() if value.requires_grad}

    def collate(rows):
        return batch_of([ROWS[index] for index in rows], image_tokens, pixels)

    if options is not None and not late:
        seecal.enable_cal(trained, options)
    one = trainer(folder, trained, collate, batch_size, accumulation, **changes)
    if options is not None and late:
        seecal.enable_cal(trained, options)
    one.train()
    after = dict(trained.named_parameters())
    return torch.cat([(after[name].detach() - value).flatten() for name, value in before.items()])


def apart(one, other):
    return float((one - other).detach().norm() / other.detach().norm())


CASES = [
    ("uniform", {}),
    ("uniform", {"adapters": True}),
    ("tokens", {"late": True}),
    ("global", {}),
    ("global", {"late": True}),
]


@pytest.mark.parametrize(("options", "how"), CASES, ids=[f"{name} {'-'.join(how)}" for name, how in CASES])
def test_the_stock_trainer_does_not_multiply_by_its_accumulation(tmp_path, fresh, options, how):
    """It leaves the division to the model, with num_items_in_batch."""
    whole, split = (update(tmp_path, fresh, OPTIONS[options], *shape, **how) for shape in ((4, 1), (1, 4)))
    if options == "global":  # Σ w of the step is not known when its first micro-batch runs: only its label tokens are
        assert 0 < apart(split, whole) < 0.3
        assert float(split.norm() / whole.norm()) == pytest.approx(1, abs=0.1)
    else:
        assert apart(split, whole) < 1e-4
    assert (apart(split, update(tmp_path, fresh, None, 1, 4, **how)) < 1e-4) is (options == "uniform")


@pytest.mark.parametrize("options", ["sample", "micro_batch"])
def test_the_stock_trainer_averages_means_of_micro_batches(tmp_path, fresh, options):
    """It reads off the model that no num_items_in_batch is taken. Made before CAL is on, it cannot know."""
    split = update(tmp_path, fresh, OPTIONS[options], 1, 4)
    model = seecal.enable_cal(copy.deepcopy(fresh[0]).train(), OPTIONS[options])
    for row in ROWS:
        (model(**batch_of([row], *fresh[1:])).loss / 4).backward()
    expected = [torch.zeros_like(one) if one.grad is None else -0.01 * one.grad for one in model.parameters()]
    assert apart(split, torch.cat([one.flatten() for one in expected])) < 1e-4
    with pytest.raises(ValueError, match=rf"normalize='{options}' with num_items_in_batch.*before the trainer is made"):
        update(tmp_path, fresh, OPTIONS[options], 1, 4, late=True)


def test_what_trainers_read_of_the_model_comes_back(case):
    model, _ = case
    attributes = set(vars(model))
    seecal.enable_cal(model, CALOptions(normalize="matched"))
    assert model.accepts_loss_kwargs is False
    assert set(vars(seecal.disable_cal(model))) == attributes
    model.accepts_loss_kwargs = True  # somebody's own
    assert seecal.disable_cal(seecal.enable_cal(model, CALOptions(normalize="matched"))).accepts_loss_kwargs is True


@pytest.mark.parametrize("count", [50, torch.tensor(50), torch.tensor(0)], ids=["int", "tensor", "nothing"])
@pytest.mark.parametrize("normalize", ["global", "tokens"])
def test_num_items_in_batch_is_the_divisor(case, normalize, count):
    model, batch = case
    cal = seecal.enable_cal(model, CALOptions(normalize=normalize))(**batch, num_items_in_batch=count)
    mean = 1 if normalize == "tokens" else cal.cal.weights.mean()
    torch.testing.assert_close(cal.loss, cal.cal.loss_sum / mean / max(int(count), 1), atol=0, rtol=1e-5)
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert float(model(**nothing, num_items_in_batch=count).loss.detach()) == 0


def test_a_training_forward_without_labels_is_told_of_once(tmp_path, fresh, case, caplog):
    """Trainer takes them out where it smooths labels, so that the plain loss was trained without a word."""
    with caplog.at_level("WARNING", logger="seecal"):
        smoothed = update(tmp_path, fresh, OPTIONS["global"], 2, 2, label_smoothing_factor=0.1)
        assert caplog.text.count("without labels") == 1, "two micro-batches"
        assert "label_smoothing_factor" in caplog.text
        assert apart(smoothed, update(tmp_path, fresh, None, 2, 2, label_smoothing_factor=0.1)) == 0
        caplog.clear()
        model, batch = case
        seecal.enable_cal(model)
        shifted = {"shift_labels": batch.pop("labels")}
        with torch.no_grad():
            model(**batch)
        model.eval()(**batch)
        assert not caplog.text, "nothing trains there"
        for _ in range(2):
            model.train()(**batch, **shifted)
        assert caplog.text.count("shift_labels") == 2, "in the list of what came, and in the reason"


def test_training_that_goes_past_our_forward_is_told_of_once(case, caplog):
    """trl.SFTTrainer puts a forward of its own over ours, which calls the base model and makes the plain loss."""
    model, batch = case
    add_fused_lm_head(seecal.enable_cal(model))
    twin = copy.deepcopy(model)
    with caplog.at_level("WARNING", logger="seecal"):
        model(**batch)
        with torch.no_grad():
            model(**batch, fused_lm_head=True)
        model.eval()(**batch, fused_lm_head=True)
        assert not caplog.text
        for _ in range(2):
            model.train()(**batch, fused_lm_head=True)
        assert caplog.text.count("seecal.CALTrainer") == 1
        for _ in range(2):
            twin.model(batch["input_ids"])
        assert caplog.text.count("the base model alone") == 2
        caplog.clear()
        seecal.disable_cal(model)
        model(**batch, fused_lm_head=True)
        assert not caplog.text
        assert not model.model._forward_pre_hooks
    seecal.enable_cal(model)
    del model.forward
    seecal.enable_cal(seecal.disable_cal(model))
    assert len(model.model._forward_pre_hooks) == 1


def test_trls_own_head_under_cal_is_refused(case):
    model, batch = case
    add_fused_lm_head(model)
    seecal.enable_cal(model)
    with pytest.raises(ValueError, match=r"fused_lm_head=True .* seecal.CALTrainer"):
        model(**batch, fused_lm_head=True)
    with torch.no_grad():
        assert model(**batch, fused_lm_head=True).log_probs is not None


def test_a_training_forward_with_a_cache(case, caplog):
    model, batch = case
    expected = seecal.enable_cal(model)(**batch)
    seecal.core.patched_forward._say_no_cache.cache_clear()
    with caplog.at_level("WARNING", logger="seecal"):
        for _ in range(2):
            output = model(**batch, use_cache=True)
            assert torch.equal(output.loss, expected.loss)
            assert output.past_key_values is None
    assert caplog.text.count("without a cache") == 1
    past = DynamicCache(config=model.config.get_text_config())
    with pytest.raises(ValueError, match=r"past_key_values .* prefix tuning .* peft.LoraConfig"):
        model(**batch, past_key_values=past)
    with torch.no_grad():
        assert not hasattr(model(**batch, past_key_values=past), "cal")


VIRTUAL = {
    "prefix": (peft.PrefixTuningConfig, "past_key_values"),
    "prompt": (peft.PromptTuningConfig, "input_ids"),
    "p-tuning": (peft.PromptEncoderConfig, "input_ids"),
}


@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens_are_refused_before_and_after(case, kind):
    model, batch = case
    config, word = VIRTUAL[kind]
    sizes = {"num_layers": 3, "token_dim": 64, "num_attention_heads": 4, "num_virtual_tokens": 4}
    before = peft.get_peft_model(copy.deepcopy(model), config(task_type="CAUSAL_LM", **sizes))
    with pytest.raises(ValueError, match=rf"{config.__name__}: virtual tokens.*LoraConfig"):
        seecal.enable_cal(before)
    later = peft.get_peft_model(seecal.enable_cal(model), config(task_type="CAUSAL_LM", **sizes)).train()
    with pytest.raises(ValueError, match=rf"{word}.*LoraConfig"):
        later(**batch)


def saved(model):
    kept = io.BytesIO()
    torch.save(model, kept)
    return torch.load(io.BytesIO(kept.getvalue()), weights_only=False)


WAYS = {"pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": saved, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("adapters", [False, True], ids=["bare", "peft"])
def test_copies_and_pickles_of_a_model_train_with_cal(fresh, case, way, adapters):
    batch, model = case[1], copy.deepcopy(fresh[0]).train()
    model = seecal.enable_cal(lora(model) if adapters else model)
    copied = WAYS[way](model)
    expected = model(**batch).loss
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    output = copied(**batch)
    assert torch.equal(output.loss, expected), "CAL's, with its own weights"
    assert output.cal is not None
    with pytest.raises(ValueError, match="already enabled"):
        seecal.enable_cal(copied)
    inner = copied.get_base_model() if adapters else copied
    attributes = set(vars(inner)) - {"forward", "_seecal"}
    seecal.disable_cal(copied)
    assert set(vars(inner)) == attributes
    assert not hasattr(copied(**batch), "cal")


@pytest.mark.parametrize("again", [seecal.enable_cal, seecal.disable_cal])
def test_a_pickle_from_under_a_wrapper_can_be_mended(fresh, case, again):
    """accelerate's is a bound method: what is pickled of it is its name."""
    model = seecal.enable_cal(copy.deepcopy(fresh[0]).train())
    model.forward = (lambda self, *args, **kwargs: None).__get__(model)
    model.forward.__func__.__name__ = "forward"
    copied = again(pickle.loads(pickle.dumps(model)))
    assert hasattr(copied(**case[1]), "cal") is (again is seecal.enable_cal)
    assert ("forward" in vars(copied)) is (again is seecal.enable_cal)


class Answering(torch.nn.Module):
    """As DeepSpeed's engine: what it does not have, the model inside of it has."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


@pytest.mark.parametrize("adapters", [False, True], ids=["bare", "peft"])
def test_wrappers_that_answer_for_the_model_are_refused(case, adapters, monkeypatch):
    model, batch = case
    with pytest.raises(ValueError, match="Answering only answers for the model inside"):
        seecal.enable_cal(Answering(model))
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    torch.nn.Module.__init__(wrapped)
    wrapped._fsdp_wrapped_module = lora(model) if adapters else model
    for refused in (lambda: seecal.enable_cal(wrapped), lambda: seecal.visual_delta(wrapped, batch)):
        with pytest.raises(ValueError, match=r"FSDP version 1.*fully_shard"):
            refused()
    assert "forward" not in vars(model)


def test_a_head_that_is_offloaded_is_named(case):
    model, batch = case
    AcceleratorState._reset_state(reset_partial_state=True)
    cpu_offload(model, execution_device=torch.device("cpu"))
    seecal.enable_cal(model)
    for measured in (lambda: model(**batch), lambda: seecal.visual_delta(model, batch)):
        with pytest.raises(ValueError, match=r"weight is on meta .* cpu: a device_map"):
            measured()

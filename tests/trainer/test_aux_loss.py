"""The load-balancing loss of mixture-of-experts models in CALTrainer: what the model's own forward adds, over a step."""

import copy

import pytest
import torch
from datasets import Dataset

from seecal import CALTrainer
from tests.support import zoo
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_llava_processor

NAME, COEFFICIENT, RATE = "qwen3_vl_moe", 0.3, 0.1
PARTS = {1: [[0, 1, 2, 3]], 2: [[0, 1], [2, 3]], 4: [[0], [1], [2], [3]]}  # micro-batches of a step's records


def model():
    made = copy.deepcopy(zoo.model_of(NAME, "sdpa")).train()
    made.config.text_config.router_aux_loss_coef = COEFFICIENT
    return made


def batch(rows):
    """Each row alone and then together, so that it does not depend on the split."""
    parts = [zoo.batch_of(NAME, [zoo.MIXED[row]], seed=7 + row) for row in rows]
    length = max(part["input_ids"].shape[1] for part in parts)
    made = {}
    for name in {name: None for part in parts for name in part}:
        values = [part[name] for part in parts if name in part]
        if values[0].shape[:1] == (1,) and values[0].ndim == 2 and "pixel" not in name and "grid" not in name:
            fill = -100 if name == "labels" else 0
            values = [torch.nn.functional.pad(value, (0, length - value.shape[1]), value=fill) for value in values]
        made[name] = torch.cat(values)
    return made


def collate(records):
    return batch([record["id"] for record in records])


def trainer(folder, split, accumulation, **changes):
    made = model()
    args = sgd_config(
        folder, split, accumulation, max_steps=1, learning_rate=RATE, max_grad_norm=0.0, gradient_checkpointing=False,
        **{"weighting": "uniform", **changes},
    )  # fmt: skip
    data = Dataset.from_list([{"id": row, "messages": []} for row in range(4)])
    processor = tiny_llava_processor()
    made.resize_token_embeddings(max(processor.tokenizer.get_vocab().values()) + 1)
    return CALTrainer(made, args, collate, data, eval_dataset=data, processing_class=processor)


def steps_of(this):
    before = {name: parameter.detach().clone() for name, parameter in this.model.named_parameters()}
    this.train()
    return {
        name: (before[name] - parameter.detach()) / RATE for name, parameter in this.model.named_parameters()
    }, before


def own_gradients(this, before, parts, shares):
    """Of Σ share · the model's own loss (cross-entropy and auxiliary loss) over the micro-batches."""
    plain = copy.deepcopy(zoo.model_of(NAME, "sdpa")).train()
    plain.config.text_config.router_aux_loss_coef = COEFFICIENT
    plain.resize_token_embeddings(this.model.get_input_embeddings().num_embeddings)
    plain.load_state_dict(before)
    plain.zero_grad()
    aux = []
    for rows, share in zip(parts, shares, strict=True):
        outputs = plain(**batch(rows), output_router_logits=True)
        (share * outputs.loss).backward()
        aux.append(outputs.aux_loss.item())
    zeros = {name: torch.zeros_like(parameter) for name, parameter in plain.named_parameters()}
    grads = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}
    return zeros | grads, aux


def distance(ours, theirs):
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


def label_counts(parts):
    return [int((batch(rows)["labels"][:, 1:] != -100).sum()) for rows in parts]


@pytest.mark.parametrize("accumulation", PARTS)
def test_a_step_is_the_models_own(tmp_path, accumulation):
    """normalize="global": Σ W_k/W · (cross-entropy + coefficient · aux) of micro-batch k; exactly both of a single one."""
    this = trainer(tmp_path, 4 // accumulation, accumulation)
    assert this.aux_loss_enabled
    ours, before = steps_of(this)
    parts = PARTS[accumulation]
    counts = label_counts(parts)
    theirs, aux = own_gradients(this, before, parts, [count / sum(counts) for count in counts])
    assert max(aux) > 0.5, "the routers have something to balance"
    assert distance(ours, theirs) < 2e-4 * max(float(grad.abs().max()) for grad in theirs.values())
    (log,) = (entry for entry in this.state.log_history if "loss" in entry)
    assert log["aux_loss"] == pytest.approx(sum(aux) / len(aux), rel=1e-4)
    weighted = sum(count * value for count, value in zip(counts, aux, strict=True)) / sum(counts)
    assert log["loss"] == pytest.approx(log["cross_entropy"] + COEFFICIENT * weighted, rel=1e-4)


@pytest.mark.parametrize("normalize", ["micro_batch", "sample"])
def test_other_normalizers_take_each_micro_batchs_own(tmp_path, normalize):
    this = trainer(tmp_path, 2, 2, normalize=normalize)
    without = trainer(tmp_path, 2, 2, normalize=normalize, router_aux_loss_coef=0.0)
    (ours, before), (plain, _) = steps_of(this), steps_of(without)
    parts = PARTS[2]
    theirs, aux = own_gradients(this, before, parts, [0.5, 0.5])
    if normalize == "micro_batch":
        assert distance(ours, theirs) < 2e-4 * max(float(grad.abs().max()) for grad in theirs.values())
    assert distance(ours, plain) > 1e-3
    logs = [next(entry for entry in made.state.log_history if "loss" in entry) for made in (this, without)]
    assert logs[0]["loss"] - logs[1]["loss"] == pytest.approx(COEFFICIENT * sum(aux) / 2, rel=1e-3)
    assert "aux_loss" not in logs[1]


def test_the_coefficient_and_the_evaluation(tmp_path):
    this = trainer(tmp_path, 4, 1, router_aux_loss_coef=0.7)
    plain = trainer(tmp_path, 4, 1, router_aux_loss_coef=0.0)
    metrics = [made.evaluate() for made in (this, plain)]
    assert metrics[0]["eval_loss"] == pytest.approx(metrics[1]["eval_loss"]), "the cross-entropy alone"
    assert metrics[0]["eval_aux_loss"] > 0.5
    assert "eval_aux_loss" not in metrics[1]
    this.model.config.text_config.output_router_logits = False  # the trainer asks by an argument
    this.train()
    (log,) = (entry for entry in this.state.log_history if "loss" in entry)
    assert log["loss"] == pytest.approx(log["cross_entropy"] + 0.7 * log["aux_loss"], rel=1e-4)


def test_a_coefficient_for_a_model_without_experts(tmp_path):
    from tests.support.tiny import tiny_dataset, tiny_llava

    args = sgd_config(tmp_path, 4, 1, router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match="not a Mixture-of-Experts model"):
        CALTrainer(tiny_llava(), args, train_dataset=tiny_dataset(4), processing_class=tiny_llava_processor())

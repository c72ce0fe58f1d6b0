"""What one optimizer step is made of: a short last one, a loss scale, and the sum over micro-batches by hand."""

import copy

import pytest
import torch
from torch import nn

from seecal import CALTrainer
from seecal.trainer.metrics import RunningSums
from seecal.trainer.step import GlobalStep
from seecal.trainer.step_watch import StepWatch, bad_step
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor

CPU = torch.device("cpu")


@pytest.mark.parametrize("normalize", ["sample", "micro_batch"])
def test_a_short_last_step_is_divided_by_its_own_micro_batches(tmp_path, normalize):
    """12 records in micro-batches of 4, two a step: the second step has one, and is that of a step of 4 records."""
    rate = 0.05

    def second_step(accumulation, records):
        args = sgd_config(
            tmp_path, 4, accumulation, max_steps=-1, num_train_epochs=1, learning_rate=rate, max_grad_norm=0.0,
            normalize=normalize,
        )  # fmt: skip
        this = CALTrainer(start, args, train_dataset=records, processing_class=tiny_llava_processor())
        this.train()
        losses = [entry["loss"] for entry in this.state.log_history if "loss" in entry]
        return losses, {name: value.clone() for name, value in this.model.state_dict().items()}

    data, start = tiny_dataset(12), tiny_llava()
    _, after_one = second_step(2, data.select(range(8)))
    start = tiny_llava()
    losses, after_two = second_step(2, data)
    start = tiny_llava()
    start.load_state_dict(after_one)
    alone_loss, alone = second_step(1, data.select(range(8, 12)))
    assert losses[1] == pytest.approx(alone_loss[0], abs=1e-5)
    assert max((after_two[name] - alone[name]).abs().max().item() for name in alone) <= 1e-6
    assert max((after_two[name] - after_one[name]).abs().max().item() for name in alone) >= 1e-3


class Scaler:
    def __init__(self, scale):
        self._scale = scale

    def get_scale(self):
        return self._scale


INFINITE = torch.tensor(float("inf"))


def watched(*records):
    """A step of one micro-batch whose forward is finite."""
    watch = StepWatch(CPU)
    watch.begin({}, records)
    return watch


def test_an_overflow_under_a_loss_scale_is_the_scalers():
    fine = torch.tensor(1.0)
    assert bad_step(fine, fine, None, 3, watched()) is None
    assert bad_step(fine, fine, Scaler(65536.0), 3, watched()) is None
    assert bad_step(fine, INFINITE, Scaler(65536.0), 3, watched()) is None  # it skips the step and halves its scale
    assert bad_step(fine, INFINITE, Scaler(1.0), 3, watched()) is None
    nothing_left_to_halve = bad_step(fine, INFINITE, Scaler(0.5), 3, watched("record 'a'")).sentence()
    assert "step 3: the loss is 1 and the gradient norm inf" in nothing_left_to_halve
    assert "(record 'a')" in nothing_left_to_halve
    assert "the gradient norm inf" in bad_step(fine, INFINITE, None, 3, watched()).sentence()
    for loss, shown in ((INFINITE, "inf"), (torch.tensor(float("nan")), "nan"), (-INFINITE, "-inf")):
        assert f"step 3: the loss is {shown} " in bad_step(loss, fine, Scaler(65536.0), 3, watched()).sentence()


@pytest.mark.parametrize("scale", [4.0, 0.5])
def test_a_training_with_a_loss_scale_goes_on_after_an_overflow(tmp_path, scale):
    model, gradients = tiny_llava(), []
    projector = model.model.multi_modal_projector.linear_1.weight
    this = CALTrainer(
        model,
        sgd_config(tmp_path, 4, 1, max_steps=2),
        train_dataset=tiny_dataset(8),
        processing_class=tiny_llava_processor(),
    )
    this.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def overflow_once(grad):
        gradients.append(grad)
        return grad * (float("inf") if len(gradients) == 1 else 1)

    before = projector.detach().clone()
    projector.register_hook(overflow_once)
    if scale < 1:
        with pytest.raises(FloatingPointError, match="step 1"):
            this.train()
        assert torch.equal(projector, before)
    else:
        this.train()
        assert this.accelerator.scaler.get_scale() == scale / 2, "the scaler skipped one step of the two"
        assert not torch.equal(projector, before)
        assert bool(projector.isfinite().all())


class Accelerator:
    """One rank; ``sync_gradients`` at the last of the step's micro-batches."""

    num_processes, sync_gradients = 1, False

    def reduce(self, value, how):
        return value


class Output:
    aux_loss = None

    def __init__(self, loss_sum, weight_sum, aux_loss=None):
        self.loss_sum, self.weight_sum, self.aux_loss = loss_sum, torch.tensor(weight_sum), aux_loss


@pytest.mark.parametrize("with_aux", [False, True])
@pytest.mark.parametrize("weights", [[2.0], [2.0, 6.0], [0.0, 4.0], [0.0, 0.0]])
def test_a_step_by_hand(weights, with_aux):
    layer, accelerator, sums = nn.Linear(3, 1, bias=False), Accelerator(), RunningSums(CPU)
    reference = copy.deepcopy(layer)
    step = GlobalStep(accelerator, sums, CPU)
    for index, weight in enumerate(weights):
        accelerator.sync_gradients = index == len(weights) - 1
        inputs = torch.arange(3.0) + index
        aux = layer(inputs.cos()).sum() if with_aux else None
        step.share(Output(weight * layer(inputs).sum(), weight, aux), 10).backward()
    loss = step.finish(layer)
    total = sum(weights)
    expected = sum(
        weight
        * (reference(torch.arange(3.0) + index).sum() + with_aux * reference((torch.arange(3.0) + index).cos()).sum())
        for index, weight in enumerate(weights)
    ) / (total or 1)
    expected.backward()
    torch.testing.assert_close(layer.weight.grad, reference.weight.grad)
    torch.testing.assert_close(loss, expected.detach())
    assert step._divisor is None
    step.share(Output(layer(torch.ones(3)).sum(), 1.0), 10)
    step.forget()
    assert not sums
    assert step._divisor is None

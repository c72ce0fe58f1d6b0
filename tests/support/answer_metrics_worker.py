"""A rank of tests/trainer/test_answer_metrics.py: steps with and without answers in between, a sharded model's answers."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from seecal import CALTrainer, VisionCollator, enable_cal
from seecal.models.generate import answers
from seecal.trainer.answer_metrics import AnswerMetric
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava_processor
from tests.trainer.test_answer_metrics import ASKED, network, questions


def steps(folder, evaluation, **changes):
    args = sgd_config(folder, 2, 1, learning_rate=0.005, eval_strategy="steps", eval_steps=2, **changes)
    data = {"train_dataset": tiny_dataset(32), "eval_dataset": evaluation}
    trainer = CALTrainer(network(), args, processing_class=tiny_llava_processor(), **data)
    trainer.train()
    log = [[one["loss"], one["grad_norm"]] for one in trainer.state.log_history if "loss" in one]
    figures = [one["eval_exact"] for one in trainer.state.log_history if "eval_exact" in one]
    return log, {name: value.clone() for name, value in trainer.model.state_dict().items()}, figures


def metric_of(model, ranks, rank):
    """The metric of a trainer that has nothing else, on so many ranks."""
    args = SimpleNamespace(
        eval_metric="exact", eval_metric_records=64, eval_max_new_tokens=4, on_bad="error", per_device_eval_batch_size=2
    )
    accelerator = SimpleNamespace(autocast=torch.enable_grad, process_index=rank, num_processes=ranks)
    trainer = SimpleNamespace(model=model, args=args, is_fsdp_enabled=ranks > 1, accelerator=accelerator)
    trainer.processing_class, trainer.data_collator = tiny_llava_processor(), None
    trainer.watchdog, trainer.state = SimpleNamespace(beat=lambda what: None), SimpleNamespace(global_step=0)
    return AnswerMetric(trainer)


def backward(model):
    """The loss of one record and the gradient of the head, whole."""
    batch = VisionCollator(tiny_llava_processor())(questions()[:1])
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return float(loss.detach()), model.lm_head.weight.grad.full_tensor().clone()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    said = answers(network(), tiny_llava_processor(), questions(), max_new_tokens=4)
    evaluated = questions(dict(enumerate(said)))
    asked = {name: value for name, value in ASKED.items() if not name.startswith("eval_s")}
    plain, plain_weights, _ = steps(folder / "plain", evaluated)
    losses, weights, figures = steps(folder / "asked", evaluated, **asked)
    rank = torch.distributed.get_rank()
    right = questions({place: text for place, text in enumerate(said) if place not in (0, 3)})
    model = enable_cal(network().train())
    mesh = init_device_mesh("cpu", (2,))
    for layer in [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    before = backward(model)
    sharded = metric_of(model, 2, rank).measured(right, "eval")
    after = backward(model)
    hits = sum(text == one["messages"][-1]["content"] for text, one in zip(said, right, strict=True))
    whole = 100 * hits / len(right)
    result = {"losses": losses, "plain losses": plain, "weights": weights, "plain weights": plain_weights}
    result |= {"before": before, "after": after, "figures": figures, "sharded": sharded, "whole": whole}
    torch.save(result, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()

"""A rank of tests/trainer/test_token_logging.py: four steps with and without logged tokens, and Δ of a sharded model."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from seecal import CALTrainer, visual_delta
from seecal.core.options import CALOptions
from seecal.trainer.token_logging import TokenLogger
from tests.support.fake_wandb import Recorder, fake_wandb, give
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor


def steps(folder, **changes):
    args = sgd_config(folder, 2, 2, logging_steps=1, **changes)
    data = {"train_dataset": tiny_dataset(32), "eval_dataset": tiny_dataset(3, 3)}
    trainer = CALTrainer(tiny_llava(), args, processing_class=tiny_llava_processor(), callbacks=[Recorder()], **data)
    trainer.train()
    log = [[one["loss"], one["grad_norm"]] for one in trainer.state.log_history if "loss" in one]
    return log, {name: value.clone() for name, value in trainer.model.state_dict().items()}, trainer


def sharded(record):
    """Δ at the record's label tokens, log by log, of a model whose parts both ranks hold."""
    model = tiny_llava().train()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    logs = []
    trainer = SimpleNamespace(
        model=model, is_fsdp_enabled=True, accelerator=SimpleNamespace(autocast=torch.enable_grad), _paused=0.0,
        cal_options=CALOptions(), _prepare_inputs=dict, _tokenizer=tiny_llava_processor().tokenizer,
    )  # fmt: skip
    logger = TokenLogger(trainer, record, {"list": logs.append}, 2)
    for step in (0, 1, 2):
        state = SimpleNamespace(global_step=step, is_world_process_zero=torch.distributed.get_rank() == 0)
        (logger.on_step_end if step else logger.on_train_begin)(None, state, None)
    return torch.tensor([[token.delta for token in one.tokens] for one in logs])


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    fake = fake_wandb()
    give(SimpleNamespace(setattr=setattr), "wandb", fake)
    plain, plain_weights, _ = steps(folder / "plain")
    found, weights, trainer = steps(folder / "logged", logging_tokens_steps=2)
    rank = torch.distributed.get_rank()
    record = next(one for one in trainer.callback_handler.callbacks if isinstance(one, TokenLogger))._record
    shown = sharded(record)
    whole = visual_delta(tiny_llava().eval(), dict(record.batch)).delta
    result = {"steps": [one["train/global_step"] for one in fake.logs], "losses": found, "plain losses": plain}
    result |= {"weights": weights, "plain weights": plain_weights, "sharded": shown, "whole": whole}
    torch.save(result, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()

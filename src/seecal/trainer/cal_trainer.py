"""CALTrainer: TRL's SFTTrainer with CAL's loss, normalised over the whole optimizer step, and CAL's metrics."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from ..constants import LENGTH_COUNTS, QUARANTINED, RECORD_IDS
from ..core.decoder import compile_layers
from ..core.enable import disable_cal, enable_cal, refuse_prompt_learning
from ..core.main_pass import with_dummy_image
from ..core.options import OVER_THE_STEP
from ..core.state import state_of
from ..data.collators.image_tokens import check_processor, explain_processor_mismatch
from ..families.table import image_ids, unwrap
from ..ops.distributed import world_size
from .answer_metrics import answer_metric
from .arguments import cal_config, check_reporting, other_loss, refuse_other_losses
from .bad_steps import stop_at
from .cal_config import CALConfig
from .checkpoints import has_named_adapters
from .data_trainer import DataTrainer
from .frozen_tower import forward_only
from .measured_before import with_measured
from .metrics import RunningSums, WaitHint, Waiting, count_tokens, evaluation_metrics, memory_metrics, token_metrics
from .quarantine import QuarantineCallback
from .resuming import ExactCallback
from .samples import Kind, check_token_ids
from .step import GlobalStep
from .step_watch import StepWatch, bad_step
from .token_logging import token_logger
from .trl_compat import (
    explain_quantised_copies,
    hide_cal_fields_from_trl,
    keep_precision_of_adapters,
    load_as_saved,
    only_trusted_files,
    patch_eval_head,
    take_off_mixed_precision,
)

logger = logging.getLogger(__name__)


class CALTrainer(DataTrainer):
    """:class:`trl.SFTTrainer` that trains with CAL. Takes the same arguments, with a :class:`seecal.CALConfig`; a
    :class:`trl.SFTConfig` or ``TrainingArguments`` is made into one. docs/trl.md says what is the same and what is not.

    Training logs the CAL ``loss`` (Σ w·CE / Σ w, nats), the plain ``cross_entropy`` (nats a label token), ``delta_mean``
    (logits), ``share_at_alpha``, ``share_inside`` and ``share_at_beta`` (of the label tokens with a contrast),
    ``label_tokens``, ``tokens_per_second`` (without padding, evaluation not counted), ``contrast_token_share`` (of all
    token positions that went through the decoder), ``records_dropped`` and ``records_truncated`` (``on_long``, ``on_bad``),
    and TRL's ``mean_token_accuracy`` (of the label tokens), ``num_tokens`` and, for mixture-of-experts models, ``aux_loss``
    (part of ``loss``, with its coefficient); all over the steps since the last log and over all ranks.
    ``data_wait_share`` is the share of that time spent waiting for the next batch, its copy to the device included; a share
    that stays high is said once. The first log includes the start of the dataloader's workers. ``host_memory_gib`` and
    ``host_memory_peak_gib`` are the resident set of the rank that has the largest, without its workers.

    ``eval_loss`` is the plain cross-entropy Σ CE / Σ tokens of the whole evaluation set; TRL's ``eval_entropy`` and
    ``eval_mean_token_accuracy`` are means over the same tokens.

    With ``eval_metric`` the model answers records at each evaluation, and ``eval_exact`` or the like is logged: the figure
    of :func:`seecal.evaluate` on the same records.

    With ``logging_tokens_steps`` the tokens of one evaluation record are logged, coloured by Δ (docs/logging.md).

    A data set is any collection of records: of ``datasets``, a list, a torch data set. Its first record tells what it
    holds, also for each one of several in an evaluation. Records with ``messages`` go through
    :class:`seecal.VisionCollator` unless ``data_collator`` is given: only assistant turns are labels. Images are decoded
    when a batch is made, never up front.

    Raises:
        ValueError: ``args`` is no config; the model is not a vision-language model; data that would be learnt wrongly; an
            argument that CAL cannot honour; from ``train()``, a subclass that leaves CAL's loss out.
        FloatingPointError: from ``train()``, on all ranks, before the optimizer step with a Δ, a loss or a gradient norm
            that is not finite. It names the records and the folder that :func:`seecal.replay` takes.
    """

    _tag_names = ["trl", "sft", "seecal", "cal"]  # noqa: RUF012  # TRL's own attribute
    _name = "CAL"
    _paper = {  # noqa: RUF012
        "title": "Seeing the Image: Prioritizing Visual Correlation by Contrastive Alignment",
        "id": "2405.17871",
        "citation": "@article{xiao2024seeing,\n"
        "    title  = {{Seeing the Image: Prioritizing Visual Correlation by Contrastive Alignment}},\n"
        "    author = {Xin Xiao and Bohong Wu and Jiacong Wang and Chunyuan Li and Xun Zhou and Haoyuan Guo},\n"
        "    year   = 2024,\n    eprint = {arXiv:2405.17871}\n}",
    }

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Any = None,
    ) -> None:
        args = cal_config(args, model)
        args.refuse_unsupported()  # it may have been changed since it was made
        train_dataset = with_measured(train_dataset, args, model, processing_class)
        check_reporting(args)
        refuse_prompt_learning(model, peft_config)
        given = {"data_collator": data_collator, "train_dataset": train_dataset, "eval_dataset": eval_dataset}
        given |= {"formatting_func": formatting_func}
        train_dataset, eval_dataset = self._look_at_data(args, given, processing_class)
        if isinstance(model, nn.Module):
            for wrapped in {model, unwrap(model)}:
                take_off_mixed_precision(wrapped)
            if _left_on(unwrap(model)):
                disable_cal(model)  # else enable_cal would refuse a second stage
        with (
            only_trusted_files(model, args),
            hide_cal_fields_from_trl(args, self._kind is Kind.CONVERSATIONS),
            keep_precision_of_adapters(model),
            explain_quantised_copies(peft_config),
        ):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_loss_func=compute_loss_func,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                quantization_config=quantization_config,
                peft_config=peft_config,
                formatting_func=formatting_func,
            )
        refuse_other_losses(self.compute_loss_func, self.accelerator.parallelism_config)
        self._turn_on(args)

    def _turn_on(self, args: CALConfig) -> None:
        """Everything of CAL's, on the model, its data and its loss."""
        model = unwrap(self.model)
        ids = image_ids(model.config)
        patch_eval_head(model)
        self._put_data_in_place(ids)
        self.add_callback(QuarantineCallback(self))
        self.add_callback(ExactCallback(self))
        self._oddity = check_processor(self.data_collator, model, ids)  # first: another family's has other ids too
        check_token_ids(model, self._tokenizer, ids)
        self.cal_options = args.cal_options()
        enable_cal(cast(nn.Module, self.model), self.cal_options)
        if args.torch_compile:
            compile_layers(model, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
            if args.gradient_checkpointing and args.padding_free is not False:
                logger.warning(
                    "torch_compile=True with gradient checkpointing: layers run uncompiled on packed rows, whose attention "
                    "is not part of a graph. Set padding_free=False to have all of them compiled."
                )
        state = state_of(model)
        state.by_trainer = True  # the next stage's trainer may change the options
        state.counts_top1 = True
        # Have Trainer count each step's labels whatever the model's signature, and leave accumulation to compute_loss.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True  # type: ignore[assignment]
        self._loss_shifts_labels = True  # a label in the first column is predicted by nothing, and not counted
        self._start_counting()
        if (tokens := token_logger(self)) is not None:
            self.add_callback(tokens)
        self._answer_metric = answer_metric(self)

    def _start_counting(self) -> None:
        self._window = RunningSums(self.args.device)  # since the last log
        self._step = RunningSums(self.args.device)  # since the last optimizer step
        self._eval = RunningSums(self.args.device)
        by_tokens = self.cal_options.normalize == "tokens"
        self._global_step = GlobalStep(self.accelerator, self._step, self.args.device, by_tokens)
        self._is_our_loss = False  # whether compute_loss was asked for the loss of the current micro-batch
        self._window_start: float | None = None
        self._watch = StepWatch(self.args.device)  # what this step is made of on this rank
        self._paused = 0.0
        self._wait_hint = WaitHint()

    # ---- Training ----

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # auto_find_batch_size starts over in the middle of a step
        self._window.clear()
        self._global_step.forget()
        self._watch.clear()
        self._window_start = None
        try:
            with forward_only(self.model):  # gradient checkpointing is on by now
                return super()._inner_training_loop(*args, **kwargs)
        finally:
            self._watch.clear()
            state_of(unwrap(self.model)).forget_steps()

    def _run_epoch(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super()._run_epoch(model, *args, **kwargs)
        if self._watch.batches:  # a callback has ended the epoch in the middle of a step
            model.zero_grad()
            self._global_step.forget()
            self._watch.clear()

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one step. The time they take is counted, without that of counting their labels."""
        if self._window_start is None:
            self._window_start, self._paused = time.perf_counter(), 0.0
        waited = Waiting(epoch_iterator)
        batches = super().get_batch_samples(waited, num_batches, device)
        self._window.add(waited=waited.seconds)
        return batches

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self._window_start is None:  # a loop of its own
            self._window_start, self._paused = time.perf_counter(), 0.0
        self._is_our_loss = False
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self._is_our_loss:
            raise other_loss(self, "compute_loss")
        if self.cal_options.normalize not in OVER_THE_STEP:
            return loss
        if not self.accelerator.sync_gradients:
            return torch.zeros_like(loss)  # the step's loss is known, and logged, with its last micro-batch
        return self._global_step.finish(model)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """What to back-propagate for one micro-batch; in evaluation the plain cross-entropy of the batch."""
        long, names = inputs.pop(LENGTH_COUNTS, None), inputs.pop(RECORD_IDS, ())
        self._put_aside(inputs.pop(QUARANTINED, ()))
        if not cast(nn.Module, self.model).training:
            return self._evaluation_loss(model, inputs, return_outputs)
        if inputs.get("labels") is None:
            raise ValueError(
                f"the data collator made no labels, only {', '.join(sorted(inputs))}: there is nothing to learn"
            )
        self._is_our_loss = True
        if self.aux_loss_enabled:  # an argument: classes of vision-language models do not read their config for it
            inputs["output_router_logits"] = True
        state_of(unwrap(self.model)).step = self.state.global_step  # for contrast_every: all of a step or nothing of it
        micro_batch = self._watch.begin(inputs, names)
        with explain_processor_mismatch(self._oddity):
            outputs = model(**inputs)
        micro_batch.note(outputs.cal)
        count_tokens(self._window, outputs.cal, inputs.get("attention_mask"), self.cal_options)
        if long is not None:
            self._window.add(dropped=long[0], truncated=long[1])
        if self.aux_loss_enabled:
            self._window.add(aux_loss=outputs.aux_loss, forwards=1)
        if self.cal_options.normalize in OVER_THE_STEP:
            loss = self._global_step.share(outputs.cal, num_items_in_batch)
        else:
            loss = outputs.loss / getattr(self, "current_gradient_accumulation_steps", 1)
            self._step.add(loss=loss)
        if self.is_deepspeed_enabled:  # its optimizer step is part of backward
            self._stop_unless_finite(loss.detach(), loss.detach())
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Trainer asks for it after clipping and right before the optimizer step.
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else torch.as_tensor(grad_norm)
        if not self._step:
            raise other_loss(self, "training_step")
        self._stop_unless_finite(self._step.take("loss"), norm.detach())
        self._watch.clear()
        return grad_norm

    def _stop_unless_finite(self, loss: Tensor, norm: Tensor) -> None:
        bad = bad_step(loss, norm, self.accelerator.scaler, self.state.global_step + 1, self._watch)
        if bad is not None:
            stop_at(bad, self)

    def _send_telemetry(self) -> None:
        """TRL would tell a server which kind of model trains on which GPUs. Nothing leaves this machine unasked."""

    # ---- Checkpoints ----

    def _running(self) -> dict[str, Any]:
        seconds = 0.0 if self._window_start is None else time.perf_counter() - self._window_start - self._paused
        sums = {"window": self._window.numbers(), "seconds": seconds, "tokens": self._total_train_tokens}
        return {**super()._running(), **sums}

    def _run_on(self, running: Mapping[str, Any], parts: int, counts: bool = True) -> None:
        super()._run_on(running, parts, counts)
        self._total_train_tokens = running["tokens"]
        if running["window"]:
            self._window.add(**{name: value if counts else 0.0 for name, value in running["window"].items()})
            self._window_start, self._paused = time.perf_counter() - running["seconds"], 0.0

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_as_saved(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._check_best()
        best = cast(str, self.state.best_model_checkpoint)
        if self._load_as_saved(best):
            return
        if has_named_adapters(best):  # Trainer looks for them where it resumes alone
            super()._load_from_checkpoint(best)
        else:
            super()._load_best_model()

    def _load_as_saved(self, folder: str) -> bool:
        """Loads the whole model from what save_pretrained wrote; False where adapters or shards are loaded instead."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or is_peft_model(self.model):
            return False
        load_as_saved(self.model, folder)
        return True

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if load_result.missing_keys or load_result.unexpected_keys:
            raise ValueError(
                f"the checkpoint does not hold this model's weights: missing {load_result.missing_keys}, unexpected "
                f"{load_result.unexpected_keys}. Training would go on from other weights than it stopped with."
            )

    # ---- Metrics ----

    def _window_metrics(self) -> dict[str, float]:
        sums = self._window.read(self.accelerator)
        assert self._window_start is not None
        seconds = max(time.perf_counter() - self._window_start - self._paused, 1e-9)
        self._window_start = None
        self._total_train_tokens += int(sums["tokens"])
        speed = {"tokens_per_second": sums["tokens"] / seconds, "num_tokens": self._total_train_tokens}
        if "waited" in sums:
            share = sums["waited"] / (seconds * self.accelerator.num_processes)
            speed["data_wait_share"] = share
            if self.is_world_process_zero():
                self._wait_hint.see(share, self.args.dataloader_num_workers, self.args.image_decoding)
        return {**token_metrics(sums), **speed, **memory_metrics(self.args.device)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._window:  # Trainer's log of training steps, which all ranks make
            logs.update(self._window_metrics())
        super().log(logs, start_time)

    # ---- Evaluation ----

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's; where ranks share weights, the same modules run on all of them whether or not a batch has images."""
        shared = world_size() > 1 and (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        with with_dummy_image(unwrap(self.model), inputs) if shared else contextlib.nullcontext():
            return super().prediction_step(model, inputs, *args, **kwargs)

    def _evaluation_loss(self, model: nn.Module, inputs: Any, return_outputs: bool) -> Any:
        with torch.no_grad():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)  # TRL's route: logits in tiles, never kept
        of_rows = [-outputs.log_probs, outputs.entropy, outputs.is_top1, outputs.label_mask]
        rows = torch.stack([of_row.float().sum(1) for of_row in of_rows], dim=1)
        # Without the rows that accelerate repeats to fill the last batch
        nll, entropy, correct, tokens = self.accelerator.gather_for_metrics(rows.contiguous()).sum(0).unbind()
        self._eval.add(nll=nll, entropy=entropy, correct=correct, tokens=tokens)
        if outputs.aux_loss is not None:
            self._eval.add(aux_loss=outputs.aux_loss, forwards=1)
        loss = rows[:, 0].sum() / rows[:, 3].sum().clamp(min=1)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**{name: value for name, value in inputs.items() if name != "labels"})

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None, ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> Any:  # fmt: skip
        self._eval.clear()
        start = time.perf_counter()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._answer_metric is not None and self._evaluated is not None:
            answered = self._answer_metric.measured(self._evaluated, metric_key_prefix)
            cast(dict, output.metrics).update(answered)
        self._paused += time.perf_counter() - start
        if self._eval:
            sums = self._eval.read(None)  # gathered over the ranks already
            if not sums["tokens"]:
                raise ValueError(
                    f"{metric_key_prefix}: not one label token in the {output.num_samples} records evaluated"
                )
            metrics = {**evaluation_metrics(sums), "num_tokens": self._total_train_tokens}
            cast(dict, output.metrics).update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
            if metric_key_prefix.startswith("eval_"):  # one of several data sets: TRL logs these under eval_ alone, too
                for name in ("entropy", "mean_token_accuracy", "num_tokens", "aux_loss"):
                    if name in metrics:
                        self._metrics["eval"][name] = [metrics[name]]
        return output


def _left_on(model: Any) -> bool:
    """Whether CAL is on because an earlier trainer, not the caller, enabled it."""
    state = state_of(model)
    return state.options is not None and state.by_trainer

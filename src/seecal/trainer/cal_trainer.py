"""CALTrainer: TRL's SFTTrainer with CAL's loss, normalised over the whole optimizer step, and CAL's metrics."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import SFTTrainer

from ..constants import LENGTH_COUNTS, RECORD_IDS
from ..core.enable import disable_cal, enable_cal
from ..core.outputs import CALOutput
from ..core.state import state_of
from ..data.collators.image_tokens import check_processor, explain_processor_mismatch
from ..data.collators.vision import VisionCollator
from ..families.table import image_ids, unwrap
from ..scoring.join import with_weights
from .cal_config import CALConfig
from .callbacks import EpochCallback
from .collators import collator_for, has_conversations, without_contrast
from .metrics import RunningSums, WaitHint, Waiting, count_tokens, evaluation_metrics, listed_records, token_metrics
from .trl_compat import hide_cal_fields_from_trl, load_as_saved, patch_eval_head


class CALTrainer(SFTTrainer):
    """:class:`trl.SFTTrainer` that trains with CAL. Takes the same arguments, with a :class:`seecal.CALConfig`.

    Training logs the CAL ``loss`` (Σ w·CE / Σ w, nats), the plain ``cross_entropy`` (nats a label token), ``delta_mean``
    (logits), ``share_at_alpha``, ``share_inside`` and ``share_at_beta`` (of the label tokens with a contrast),
    ``label_tokens``, ``tokens_per_second`` (without padding, evaluation not counted), ``contrast_token_share`` (of all
    token positions that went through the decoder), ``records_dropped`` and ``records_truncated`` (``on_long``, ``on_bad``),
    and TRL's ``num_tokens``; all over the steps since the last log and over all ranks.
    ``data_wait_share`` is the share of that time spent waiting for the next batch, its copy to the device included; a share
    that stays high is said once. The first log includes the start of the dataloader's workers.

    ``eval_loss`` is the plain cross-entropy Σ CE / Σ tokens of the whole evaluation set; TRL's ``eval_entropy`` and
    ``eval_mean_token_accuracy`` are means over the same tokens.

    Records with ``messages`` go through :class:`seecal.VisionCollator` unless ``data_collator`` is given: only assistant
    turns are labels. Images are decoded when a batch is made, never up front.

    Raises:
        ValueError: ``args`` is no CALConfig; the model is not a vision-language model; an argument that CAL cannot honour.
        FloatingPointError: from ``train()``, before the optimizer step whose loss or gradient norm is not finite.
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

    args: CALConfig

    def __init__(
        self,
        model: Any,
        args: CALConfig | None = None,
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
        if args is None:
            args = CALConfig("CAL")
        if not isinstance(args, CALConfig):
            raise ValueError(
                f"args is a {type(args).__name__}: CALTrainer needs a seecal.CALConfig, which has the same fields"
            )
        args.refuse_unsupported()  # it may have been changed since it was made
        if args.weights is not None:
            train_dataset = with_weights(train_dataset, args.weights)
        self._conversations = has_conversations(train_dataset, data_collator, processing_class, formatting_func)
        if isinstance(model, nn.Module) and _left_on(unwrap(model)):
            disable_cal(model)  # else enable_cal would refuse a second stage
        with hide_cal_fields_from_trl(args, self._conversations):
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
        self._refuse_unsupported()
        patch_eval_head(unwrap(self.model))
        ids = image_ids(unwrap(self.model).config)
        if data_collator is None:
            self.data_collator = collator_for(args, self.processing_class, self.data_collator, ids, self._conversations)
        if isinstance(self.data_collator, VisionCollator):
            self.add_callback(EpochCallback(self.data_collator))
        self._oddity = check_processor(self.data_collator, unwrap(self.model), ids)
        self.cal_options = args.cal_options()
        enable_cal(cast(nn.Module, self.model), self.cal_options)
        state_of(unwrap(self.model)).by_trainer = True  # the next stage's trainer may change the options
        # Have Trainer count each step's labels whatever the model's signature, and leave accumulation to compute_loss.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True  # type: ignore[assignment]
        self._start_counting()

    def _start_counting(self) -> None:
        self._window = RunningSums(self.args.device)  # since the last log
        self._step = RunningSums(self.args.device)  # since the last optimizer step
        self._eval = RunningSums(self.args.device)
        self._divisor: Tensor | None = None  # of the losses of this step's micro-batches
        self._provisional = False  # whether it stands for a Σ w that was not known yet
        self._window_start: float | None = None
        self._step_records: list[str] = []  # what this step is made of on this rank, for an error
        self._paused = 0.0
        self._wait_hint = WaitHint()

    @property
    def _is_vision_dataset(self) -> bool:
        """What SFTTrainer tells by an image column; conversations are it wherever their images are, so that it leaves them
        to the collator instead of tokenising them with all their tokens as labels."""
        return self._has_image_column or self._conversations

    @_is_vision_dataset.setter
    def _is_vision_dataset(self, has_image_column: bool) -> None:
        self._has_image_column = has_image_column

    def _refuse_unsupported(self) -> None:
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func: the loss of CALTrainer is CAL's. Leave it out, or use trl.SFTTrainer.")
        if self.aux_loss_enabled:
            raise ValueError(
                f"router_aux_loss_coef={self.router_aux_loss_coef}: the load-balancing loss of mixture-of-experts models "
                "is not added to CAL's yet. Set router_aux_loss_coef=0.0 to train without it."
            )
        parallel = self.accelerator.parallelism_config
        sizes = {name: getattr(parallel, f"{name}_size", 1) for name in ("tp", "cp", "sp")} if parallel else {}
        if any(size > 1 for size in sizes.values()):
            raise ValueError(
                f"parallelism_config with {sizes}: CAL needs whole rows on each rank. Set tp, cp and sp to 1."
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = cast("list[str]", self._signature_columns)
        if self._is_vision_dataset:  # the collators name records by their id; weights may have been measured before
            columns += [name for name in ("id", "weights", "weight_ids") if name not in columns]

    # ---- Training ----

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # auto_find_batch_size starts over in the middle of a step
        for sums in (self._window, self._step):
            sums.clear()
        self._divisor = self._window_start = None
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            state_of(unwrap(self.model)).forget_steps()

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
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.cal_options.normalize != "global":
            return loss
        if not self.accelerator.sync_gradients:
            return torch.zeros_like(loss)  # the step's loss is known, and logged, with its last micro-batch
        return self._finish_step(model)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """What to back-propagate for one micro-batch; in evaluation the plain cross-entropy of the batch."""
        long, names = inputs.pop(LENGTH_COUNTS, None), inputs.pop(RECORD_IDS, ())
        if not cast(nn.Module, self.model).training:
            return self._evaluation_loss(model, inputs, return_outputs)
        if inputs.get("labels") is None:
            raise ValueError(
                f"the data collator made no labels, only {', '.join(sorted(inputs))}: there is nothing to learn"
            )
        self._step_records += names
        state_of(unwrap(self.model)).step = self.state.global_step  # for contrast_every: all of a step or nothing of it
        with explain_processor_mismatch(self._oddity):
            outputs = model(**inputs)
        count_tokens(self._window, outputs.cal, inputs.get("attention_mask"), self.cal_options)
        if long is not None:
            self._window.add(dropped=long[0], truncated=long[1])
        if self.cal_options.normalize == "global":
            loss = self._share_of_step(outputs.cal, num_items_in_batch)
        else:
            loss = outputs.loss / getattr(self, "current_gradient_accumulation_steps", 1)
            self._step.add(loss=loss)
        if self.is_deepspeed_enabled:  # its optimizer step is part of backward
            self._stop_unless_finite(loss.detach(), loss.detach())
        return (loss, outputs) if return_outputs else loss

    def _share_of_step(self, cal: CALOutput, label_count: Any) -> Tensor:
        """Σ w·CE of one micro-batch over the divisor of its step.

        Σ w of the step is known only after its last forward. Until then any divisor that is the same in all micro-batches
        and ranks will do; the label count keeps fp16 gradients in range. :meth:`_finish_step` puts Σ w in its place.
        """
        self._step.add(loss=cal.loss_sum, weight=cal.weight_sum)
        if self._divisor is None:
            self._provisional = not self.accelerator.sync_gradients  # else the first micro-batch is also the last
            if self._provisional:
                divisor = torch.as_tensor(label_count)
            else:
                divisor = self.accelerator.reduce(cal.weight_sum.clone(), "sum")
            self._divisor = torch.where(divisor > 0, divisor, 1).to(self.args.device)
        # Wrappers for several ranks average gradients: a sum over ranks needs their number.
        return cal.loss_sum * (self.accelerator.num_processes / self._divisor)

    def _finish_step(self, model: nn.Module) -> Tensor:
        """Gradients and loss of the step over Σ w of all its micro-batches and ranks, before they are clipped.

        Under an fp16 loss scale the gradients are still scaled here, which a factor does not mind.
        """
        total = self._step.over_ranks(self.accelerator)
        weight = torch.where(total["weight"] > 0, total["weight"], 1)  # no label anywhere: the gradients are zeros
        assert self._divisor is not None
        factor = (self._divisor / weight).float()
        self._divisor = None
        if self._provisional:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        grad = parameter.grad
                        grad = grad.to_local() if hasattr(grad, "to_local") else grad
                        grad.mul_(factor.to(grad.device))
        loss = (total["loss"] / weight).float()
        self._step.add(loss=loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Trainer asks for it after clipping and right before the optimizer step.
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else torch.as_tensor(grad_norm)
        self._stop_unless_finite(self._step.take("loss"), norm.detach())
        self._step_records.clear()
        return grad_norm

    def _stop_unless_finite(self, loss: Tensor, norm: Tensor) -> None:
        values = torch.stack([loss.float(), norm.to(loss.device).float()]).tolist()  # one wait for the device
        scaler = self.accelerator.scaler
        finite = [abs(value) < float("inf") for value in values]
        if finite[0] and not finite[1] and scaler is not None and scaler.get_scale() >= 1:
            return  # fp16: the scaler skips this step and halves its scale
        if not all(finite):
            raise FloatingPointError(
                f"step {self.state.global_step + 1}: the loss is {values[0]:g} and the gradient norm {values[1]:g}. "
                "Stopped before the optimizer step; the weights are those of the step before. Look at the records of this "
                f"step{listed_records(self._step_records)}, lower learning_rate, or use bf16 instead of fp16."
            )

    # ---- Checkpoints ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_as_saved(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_as_saved(cast(str, self.state.best_model_checkpoint)):
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
        return {**token_metrics(sums), **speed}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._window:  # Trainer's log of training steps, which all ranks make
            logs.update(self._window_metrics())
        super().log(logs, start_time)

    # ---- Evaluation ----

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        with self._plain_collator():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        with self._plain_collator():
            return super().get_test_dataloader(test_dataset)

    @contextlib.contextmanager
    def _plain_collator(self) -> Iterator[None]:
        """Evaluation has no second pass, so nobody needs the images without their content there."""
        training = self.data_collator
        self.data_collator = without_contrast(training)
        try:
            yield
        finally:
            self.data_collator = training

    def _evaluation_loss(self, model: nn.Module, inputs: Any, return_outputs: bool) -> Any:
        with torch.no_grad():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)  # TRL's route: logits in tiles, never kept
        of_rows = [-outputs.log_probs, outputs.entropy, outputs.is_top1, outputs.label_mask]
        rows = torch.stack([of_row.float().sum(1) for of_row in of_rows], dim=1)
        # Without the rows that accelerate repeats to fill the last batch
        nll, entropy, correct, tokens = self.accelerator.gather_for_metrics(rows.contiguous()).sum(0).unbind()
        self._eval.add(nll=nll, entropy=entropy, correct=correct, tokens=tokens)
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
        self._paused += time.perf_counter() - start
        if self._eval:
            sums = self._eval.read(None)  # gathered over the ranks already
            if not sums["tokens"]:
                raise ValueError(
                    f"{metric_key_prefix}: not one label token in the {output.num_samples} records evaluated"
                )
            metrics = {**evaluation_metrics(sums), "num_tokens": self._total_train_tokens}
            cast(dict, output.metrics).update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output


def _left_on(model: Any) -> bool:
    """Whether CAL is on because an earlier trainer, not the caller, enabled it."""
    state = state_of(model)
    return state.options is not None and state.by_trainer

"""SFTTrainer that looks at samples instead of columns: any collection of them, each data set with a collator of its own."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any, cast

from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..data.collators.processors import configure
from ..data.message_keys import MEDIA_KEYS, holds_image
from .cal_config import CALConfig
from .collators import (
    check_given_collator,
    check_settings_are_read,
    collator_for,
    completions_only,
    trl_collator_for,
    without_contrast,
)
from .quarantine import QuarantineTrainer
from .samples import Kind, first_sample, for_loader, for_trl, is_indexed, is_made_by_a_transform, kind_of
from .sampling import BY_MODALITY, GROUPED, GroupedByEpoch, ModalityByEpoch, lengths_by_modality, only_lengths

logger = logging.getLogger(__name__)

# What collators and SFTTrainer's preparation read of a sample. The others do not reach them.
_READ = (
    *("messages", "conversations", "system", "caption", "text", "file_name", "prompt", "completion", "image", "images"),
    *("id", "weights", "weight_ids"),
    *("input_ids", "labels", "seq_lengths"),
)
_PREPARED = ("tools", "chat_template_kwargs", "attention_mask", "completion_mask", "assistant_masks")


class DataTrainer(QuarantineTrainer):
    """What CALTrainer adds to SFTTrainer's handling of data. Each data set is told by its own first sample."""

    args: CALConfig

    def _look_at_data(self, args: CALConfig, data: Mapping[str, Any], processor: Any) -> tuple[Any, Any]:
        """(``train_dataset``, ``eval_dataset``) as SFTTrainer takes them; keeps what they are. Before SFTTrainer's own
        construction, with the ``data`` arguments of it.

        Raises:
            ValueError: data that cannot be read or that would be learnt wrongly, by name.
        """
        self._given_collator, self._image_ids = data["data_collator"], set[int]()
        self._own_assistant_only = args.assistant_only_loss
        self._collators: dict[tuple[Kind, bool], Any] = {}
        self._kind, train = Kind.TEXT, data["train_dataset"]
        if train is None:
            return None, data["eval_dataset"]  # SFTTrainer says that it is required
        sample = first_sample(train, "train_dataset")
        if args.train_sampling_strategy == BY_MODALITY and not is_indexed(train):
            raise ValueError(f"train_sampling_strategy={BY_MODALITY!r}: a stream is read in its order. Take it out")
        self._kind = self._kind_of(sample)
        self._train_key = self._kind, completions_only(args, sample)
        _check_columns(sample, args, self._kind)
        has_image = "image" in sample or "images" in sample  # then SFTTrainer says it
        if self._kind is Kind.CONVERSATIONS and isinstance(processor, PreTrainedTokenizerBase) and not has_image:
            raise ValueError(
                f"processing_class is a {type(processor).__name__}: conversations for a vision-language model go "
                "through its processor. Pass AutoProcessor.from_pretrained(its folder)."
            )
        if data["formatting_func"] is not None and not self._kind.tokenised_up_front:
            how = "chat template" if self._kind is Kind.CONVERSATIONS else "collator"
            logger.warning("formatting_func is not used: the %s makes text of the samples", how)
        self._train = train
        return for_trl(train, sample, self._kind), self._each(data["eval_dataset"], self._as_trl_holds_it)

    def _put_data_in_place(self, image_ids: set[int]) -> None:
        """What SFTTrainer was not to see, after its own construction; and the collator of the training."""
        self._image_ids = image_ids
        # Each data set says by itself whether it is tokenised up front: see _prepare_dataset
        self._skip_prepare_dataset = bool(dict(cast(Any, self.args.dataset_kwargs) or {}).get("skip_prepare_dataset"))
        if not self._kind.tokenised_up_front:
            self.train_dataset = for_loader(self._train)
            if not self._skip_prepare_dataset:
                self.eval_dataset = self._each(self.eval_dataset, self._prepared)
        del self._train
        check_settings_are_read(self.args, self._given_collator, self._kind)
        configure(
            self.processing_class, cast("dict[str, Any] | None", self.args.processor_kwargs)
        )  # saved with the model
        if self._given_collator is None:
            self.data_collator = collator_for(
                self.args, self.processing_class, self.data_collator, image_ids, self._kind
            )

    def _is_tokenised_up_front(self) -> bool:
        return self._kind.tokenised_up_front

    @property
    def _is_vision_dataset(self) -> bool:
        """What SFTTrainer tells by an image column; conversations are it wherever their images are, so that it leaves them
        to the collator instead of tokenising them with all their tokens as labels."""
        return self._has_image_column or not self._kind.tokenised_up_front

    @_is_vision_dataset.setter
    def _is_vision_dataset(self, has_image_column: bool) -> None:
        self._has_image_column = has_image_column

    def _kind_of(self, sample: Mapping[str, Any]) -> Kind:
        return check_given_collator(self._given_collator, kind_of(sample), self._own_assistant_only)

    def _each(self, datasets: Any, change: Any) -> Any:
        """One data set, or each of a dict of them, changed."""
        if isinstance(datasets, Mapping):
            return {name: change(dataset, f"eval_dataset[{name!r}]") for name, dataset in datasets.items()}
        return None if datasets is None else change(datasets, "eval_dataset")

    def _as_trl_holds_it(self, dataset: Any, name: str) -> Any:
        sample = first_sample(dataset, name)
        kind = self._kind_of(sample)
        return for_trl(dataset, sample, kind) if kind.tokenised_up_front else for_loader(dataset)

    def _prepared(self, dataset: Any, name: str) -> Any:
        return self._prepare_dataset(dataset, self.processing_class, self.args, False, self._formatting_func, name)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """SFTTrainer's tokenising of a whole data set, where it is one to tokenise; its labels are told by its own samples
        and not by those of the training."""
        sample = first_sample(dataset, dataset_name)
        kind = self._kind_of(sample)
        if not kind.tokenised_up_front:
            return dataset
        if kind is Kind.TOKENS and not any(name in sample for name in ("labels", "completion_mask", "assistant_masks")):
            logger.warning("the %s data set has input_ids and no labels: every token is one", dataset_name)
        kept, self.completion_only_loss = self.completion_only_loss, completions_only(args, sample)
        try:
            return super()._prepare_dataset(
                for_trl(dataset, sample, kind), processing_class, args, packing, formatting_func, dataset_name
            )
        finally:
            self.completion_only_loss = kept

    # ---- Columns and order ----

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = cast("list[str]", self._signature_columns)
        # The sampler looks for the lengths in what is left
        columns += [name for name in (*_READ, self.args.length_column_name) if name not in columns]

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        # A transform makes samples of any of the columns
        return dataset if is_made_by_a_transform(dataset) else super()._remove_unused_columns(dataset, description)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        # transformers' own orders draw from the global random numbers, which differ after a resume and between ranks
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if self.args.train_sampling_strategy == BY_MODALITY:
            return self._by_modality(train_dataset, seed)
        if self.args.train_sampling_strategy in GROUPED and is_indexed(train_dataset):
            train_dataset = only_lengths(train_dataset, self.args.length_column_name)
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        return GroupedByEpoch(sampler.batch_size, sampler.lengths, seed)

    def _by_modality(self, train_dataset: Any, seed: int) -> Any:
        args = self.args
        lengths, with_image = lengths_by_modality(train_dataset, args.length_column_name)
        batches = max(1, args.world_size) * args.gradient_accumulation_steps
        return ModalityByEpoch(lengths, with_image, batch_size=args.train_batch_size, batches=batches, seed=seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        known = isinstance(eval_dataset, Dataset) and self.args.length_column_name in eval_dataset.column_names
        if self.args.train_sampling_strategy != "group_by_length" or known:
            return super()._get_eval_sampler(eval_dataset)
        alone = is_indexed(eval_dataset) and self.args.world_size <= 1
        return SequentialSampler(eval_dataset) if alone else None  # lengths would only save padding

    # ---- Evaluation ----

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        chosen = cast(Any, self.eval_dataset)[chosen] if isinstance(chosen, str) else chosen
        self._evaluated = chosen
        with self._evaluating(chosen, "eval_dataset"):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        self._evaluated = None
        with self._evaluating(test_dataset, "test_dataset"):
            return super().get_test_dataloader(test_dataset)

    @contextlib.contextmanager
    def _evaluating(self, dataset: Any, name: str) -> Iterator[None]:
        """The collator of an evaluation data set in the place of training's: its samples may be of another kind, and
        evaluation has no second pass, so nobody needs the images without their content there."""
        training = self.data_collator
        self.data_collator = without_contrast(self._collator_of(dataset, name))
        try:
            yield
        finally:
            self.data_collator = training

    def _collator_of(self, dataset: Any, name: str) -> Any:
        if self._given_collator is not None or dataset is None:
            return self.data_collator
        sample = first_sample(dataset, name)
        key = kind, _ = self._kind_of(sample), completions_only(self.args, sample)
        if kind is self._train_key[0] and (kind is not Kind.PROMPTS or key == self._train_key):
            return self.data_collator
        if key not in self._collators:
            trl = trl_collator_for(self.args, self.processing_class, sample, kind)
            self._collators[key] = collator_for(self.args, self.processing_class, trl, self._image_ids, kind)
        return self._collators[key]


def _check_columns(sample: Mapping[str, Any], args: CALConfig, kind: Kind) -> None:
    """Says once which keys of the samples nobody reads; ValueError where the model would learn to answer without them."""
    given = {str(name): value for name, value in sample.items() if value is not None}
    for name in given.keys() & {*MEDIA_KEYS}:
        if given[name]:
            raise ValueError(
                f"train_dataset has {name!r}: only images are read, so the model would learn to answer without seeing it. "
                "Take those records, or the column, out."
            )
    if kind is Kind.CONVERSATIONS and (tools := given.keys() & {"tools", "functions"}):
        raise ValueError(
            f"train_dataset has {min(tools)!r}: chat templates are not given them. Write them into the system message, or "
            "take the column out."
        )
    read = {*_READ, *_PREPARED, args.dataset_text_field, args.length_column_name}
    unread = sorted(given.keys() - read)
    images = [name for name in unread if holds_image(given[name])]
    if images and not given.keys() & {"image", "images", "file_name"}:
        raise ValueError(
            f"train_dataset has an image under {images[0]!r} and none under 'images', so the model would learn to answer "
            f"without seeing it. Rename the column (rename_column({images[0]!r}, 'image')), or take it out."
        )
    if unread:
        logger.warning("not read of the samples of train_dataset: %s", ", ".join(unread))

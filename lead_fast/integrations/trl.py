"""`LeadSFTTrainer`: TRL's SFTTrainer on the samples that LEAD chooses while it trains.

Dataset formats, chat templates, masks (`completion_only_loss`, `assistant_only_loss`), truncation, `peft_config` and
evaluation are the host's; rounds, packing and the fused loss are those of `lead_fast.integrations.transformers`.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from trl import SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

from lead_fast.config import LeadConfig
from lead_fast.integrations.checks import check_pool
from lead_fast.integrations.transformers import LeadRounds
from lead_fast.pool import Pool

logger = logging.getLogger(__name__)

ROW = "lead_row"
_LOOKED_AT = 32  # rows, for whether the host masks anything


class LeadSFTTrainer(LeadRounds, SFTTrainer):
    """TRL's SFTTrainer with LEAD inside: the usual arguments, `pool` and `lead`.

    Args:
        model, args, **kwargs: as `trl.SFTTrainer` takes them. `per_device_train_batch_size` is the samples packed, without
            padding, into a micro-batch; `packing` stays off.
        train_dataset: a `datasets.Dataset` whose row i is row i of the pool; None makes one of the pool's own messages.
            Rows that the host drops (nothing supervised is left after truncation) are set aside.
        pool: rows with `arm` and `utility`, as `lead-fast prepare` writes them or `Pool.from_arrays` takes them. Utilities
            are means over supervised tokens: give the masks of the run that measured them, usually assistant turns only.
        lead: how to choose; None is `LeadConfig()`.

    Raises:
        ValueError: an argument or a model that packing, rounds or the fused loss cannot serve; the message names it.

    Of the host's metrics `num_tokens` is logged while training; `entropy` and `mean_token_accuracy` need the logits, which
    the fused loss never has. They are logged by evaluation. The rounds' metrics are those of `LeadTrainer`.
    """

    def __init__(
        self, model: Any, args: Any = None, *, pool: Pool, lead: LeadConfig | None = None,
        train_dataset: Dataset | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        check_pool("LeadSFTTrainer", pool)
        for name, expected in (("packing", False), ("loss_type", "nll")):
            if (got := getattr(args, name, expected)) != expected:
                raise ValueError(
                    f"LeadSFTTrainer: `{name}` must be {expected!r}, got {got!r}: rounds pack and score by themselves"
                )
        if train_dataset is None:
            if not pool.has_text:
                raise ValueError("LeadSFTTrainer: `pool` must have text where there is no `train_dataset`, got arrays alone")
            train_dataset = Dataset.from_dict({"messages": list(pool.iter_messages())})
        if not isinstance(train_dataset, Dataset) or len(train_dataset) != len(pool):
            got = f"{len(train_dataset)} rows" if isinstance(train_dataset, Dataset) else type(train_dataset).__name__
            raise ValueError(f"LeadSFTTrainer: `train_dataset` must be a Dataset of the pool's {len(pool)} rows, got {got}")
        rows = np.arange(len(pool))
        # The host shuffles, tokenizes and drops rows; this column says which are left, and where.
        super().__init__(model, args, train_dataset=train_dataset.add_column(ROW, rows), **kwargs)  # pyright: ignore
        if self._is_vision_dataset:
            raise ValueError("LeadSFTTrainer: `train_dataset` must be text, got images")
        left: Any = self.train_dataset
        kept = np.asarray(left.select_columns(ROW).with_format("numpy")[:][ROW], np.int64)
        if not len(kept):
            limit = getattr(self.args, "max_length", None)
            raise ValueError(f"LeadSFTTrainer: a row must have a supervised token within max_length {limit}, got none")
        index = np.full(len(pool), -1, np.int64)
        index[kept] = np.arange(len(kept))
        if len(kept) < len(pool):
            dropped = index < 0
            logger.warning("%d of %d rows have nothing to learn from after truncation: set aside", dropped.sum(), len(pool))
            pool = pool.with_arrays(aside=pool.aside | dropped)
        host: Any = self.args
        ids = left.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
        lengths = pc.list_value_length(ids).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]  made at import
        if host.max_length and (cut := int((lengths >= host.max_length).sum())):
            logger.warning(
                "%d of %d samples reach max_length %d: the host cuts what is longer by its `truncation_mode`, while the "
                "utilities of `lead-fast prepare` are of samples whose prompts were cut first", cut, len(kept), host.max_length,
            )  # fmt: skip
        samples = self.dataset_samples(index)
        # A collator that joins samples masks each one's first token.
        if all(sample.supervised[1:].all() for sample in samples(sorted(kept[:_LOOKED_AT].tolist()))):
            logger.warning(
                "every token is supervised: the pool's utilities must be losses over all tokens too, or set assistant_only_loss"
            )
        self.start_rounds(pool, lead, samples)
        if self.aux_loss_enabled:
            causal: Any = self._packed.causal_lm
            causal.router_aux_loss_coef = self.router_aux_loss_coef  # the host's argument, which only its own loss reads

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = sum(batch["input_ids"].numel() for batch in batches if batch["num_items"])
        self._total_train_tokens += self._ranks.sum_of(tokens)
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return batches, items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the host's; a round's line has none of the host's metrics, which are due on its own."""
        if "lead/round" not in logs:
            super().log(logs, start_time)
            return
        aside, self._metrics["train"] = self._metrics["train"], defaultdict(list)
        try:
            super().log(logs, start_time)
        finally:
            self._metrics["train"] = aside

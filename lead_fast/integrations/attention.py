"""Packed attention while a packed batch is in the model; the user's own at all other times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from lead_fast.loading import prepare_model


class AttentionSwitch:
    """Switches a model between the attention it came with (evaluation, generation, saving) and that of packed batches.

    `set_attn_implementation` walks every module; here the configurations it changes are found once.

    Args:
        model: a transformers causal LM, without an adapter's wrapper.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # Configurations of the outer modules come first: setting one also sets those it holds.
        self._configs = list({id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values())
        self._own = self._current()
        prepare_model(model)
        self._packed = self._current()
        self._set(self._own)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Packed attention inside the block; gradient checkpointing recomputes in backward, which must be inside too."""
        self._own = self._current()
        self._set(self._packed)
        try:
            yield
        finally:
            self._packed = self._current()  # the check of a model may have found that its samples run one by one
            self._set(self._own)

    def _current(self) -> list[str | None]:
        return [config._attn_implementation for config in self._configs]

    def _set(self, implementations: list[str | None]) -> None:
        for config, implementation in zip(self._configs, implementations, strict=True):
            config._attn_implementation = implementation

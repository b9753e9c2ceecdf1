"""What other smoothing coefficients would have made of the same visits: utilities replayed for a few of them at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def smoothing_values(smoothing: float) -> list[float]:
    """The smoothing coefficient in use, and the ones that it is compared with: none, half, double."""
    others = (0.0, smoothing / 2.0, min(2.0 * smoothing, 0.9)) if smoothing else (0.05, 0.1, 0.2)
    return [smoothing, *(b for b in others if b != smoothing)]


class SmoothingMemory:
    """Utilities that visited rows would have under several smoothing coefficients.

    A row's utility before a visit is (1 - b) * Lhat + b * IDU of the visit before last, its first utility where there is
    none. Its loss at a round's end is taken to be the one observed in the round.
    """

    def __init__(self, values: Sequence[float]) -> None:
        self.values = np.array(values)
        self.utilities: dict[int, np.ndarray] = {}  # of each row visited: after its last visit, and the one before; [2, B]

    def visit(self, rows: np.ndarray, before: np.ndarray, predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
        """Takes the losses `observed` of `rows` [n], and returns the mean absolute error of their utilities, [B].

        Args:
            before: loss when last seen; of a row never visited its first utility.
            predicted: loss predicted for now.
        """
        b, errors = self.values, []
        for row, old, lhat, loss in zip(*(column.tolist() for column in (rows, before, predicted, observed)), strict=True):
            last, earlier = self.utilities.get(row, (old, old))
            errors.append(np.abs((1.0 - b) * lhat + b * earlier - loss))
            self.utilities[row] = np.stack([(1.0 - b) * loss + b * last, np.broadcast_to(last, b.shape)])
        return np.mean(errors, 0)

    def state_dict(self) -> dict[str, Tensor]:
        rows = torch.tensor(list(self.utilities), dtype=torch.int64)
        utilities = np.array(list(self.utilities.values())).reshape(-1, 2, len(self.values))
        return {"rows": rows, "utilities": torch.from_numpy(utilities)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.utilities = dict(zip(state["rows"].tolist(), state["utilities"].numpy(), strict=True))

"""Models of which only the answers are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mohs.errors import ModelError


class BlackBox(nn.Module):
    """A module around a numpy function; it answers, and no gradient flows through it.

    Use it for models outside torch. The function gets a float32 array [N, ...] and answers scores [N, K] or [N], one
    row per input, larger meaning more likely. For probabilities or bare labels see the two other constructors.
    The forward pass accepts inputs that require gradients; its answer simply has none. Attacks ask it about no row that
    has been answered for good, so batches get shorter, unless it is wrapped in another module (``normalized``,
    ``nn.Sequential``): what the function needs before it belongs into the function.

    Args:
        function: From an array [N, ...] to an array [N, K], or [N] for a binary classifier.
        name: Stands for the identity of the model, since there are no weights to hash.

    Raises:
        ModelError: In the forward pass, when the function raises or answers in another shape.

    >>> box = BlackBox(lambda x: x * 2.0)
    >>> box(torch.ones(1, 3, requires_grad=True))
    tensor([[2., 2., 2.]])
    """

    by_row = True
    """Each row costs: ``mohs.target`` does not ask about settled ones, unless another module is wrapped around this one."""

    def __init__(self, function: Callable[[np.ndarray], Any], *, name: str = "") -> None:
        super().__init__()
        if not callable(function):
            raise ModelError(f"BlackBox needs a function from array to array, got a {type(function).__name__}.")
        self.function = function
        self.name = name or getattr(function, "__qualname__", type(function).__name__)
        self.train(False)

    @staticmethod
    def from_probabilities(function: Callable[[np.ndarray], Any], *, name: str = "") -> BlackBox:
        """For a function that answers probabilities [N, K]; their logarithms are the logits.

        A binary classifier may answer the probability of class 1 alone, [N] or [N, 1].
        """
        return BlackBox(lambda x: _from_probabilities(function(x)), name=name or getattr(function, "__qualname__", ""))

    @staticmethod
    def from_labels(function: Callable[[np.ndarray], Any], classes: int, *, name: str = "") -> BlackBox:
        """For a function that answers only labels [N]; the logits are 1 at the label and 0 elsewhere."""
        return BlackBox(
            lambda x: _from_labels(function(x), len(x), classes), name=name or getattr(function, "__qualname__", "")
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits as the function gives them, on the device of x, without gradient."""
        # a copy, so that a function that writes into its argument cannot change the caller's batch
        array = np.array(x.detach().cpu().numpy(), dtype=np.float32)
        try:
            scores = np.asarray(self.function(array), dtype=np.float32)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"the black box {self.name} raised {type(error).__name__}: {error} (batch {list(x.shape)})."
            ) from error
        if scores.ndim not in (1, 2) or len(scores) != len(x):
            raise ModelError(
                f"the black box {self.name} answered shape {list(scores.shape)} to a batch of {len(x)}; "
                f"allowed are [{len(x)}, classes], and [{len(x)}] for a binary classifier."
            )
        return torch.from_numpy(np.ascontiguousarray(scores)).to(x.device)

    def get_extra_state(self) -> str:
        """The name, so that hashes of different black boxes differ."""
        return self.name

    def set_extra_state(self, state: str) -> None:
        """Take the name back from a saved state."""
        self.name = state


def _from_probabilities(answer: Any) -> np.ndarray:
    """Logits [N, K] or, of the probability of class 1 alone, [N]."""
    p = np.asarray(answer, dtype=np.float64)
    tiny = float(np.finfo(np.float32).tiny)  # keeps a probability of zero finite
    logits = np.log(np.maximum(p, tiny))
    if p.ndim == 1 or p.shape[1:] == (1,):
        return (logits - np.log(np.maximum(1 - p, tiny))).reshape(len(p))
    return logits


def _from_labels(answer: Any, rows: int, classes: int) -> np.ndarray:
    """Logits [N, K] that are 1 at the label and 0 elsewhere."""
    labels = np.asarray(answer)
    if labels.shape != (rows,) or labels.dtype.kind not in "iu":
        raise ModelError(
            f"the black box answered {labels.dtype} of shape {list(labels.shape)}; "
            f"labels must be whole numbers of shape [{rows}]."
        )
    if labels.size and (labels.min() < 0 or labels.max() >= classes):
        raise ModelError(
            f"the black box answered labels {labels.min()} to {labels.max()}; "
            f"{classes} classes allow 0 to {classes - 1}."
        )
    logits = np.zeros((rows, classes), dtype=np.float32)
    logits[np.arange(rows), labels] = 1
    return logits

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
    The forward pass accepts inputs that require gradients; its answer simply has none.

    Args:
        function: From an array [N, ...] to an array [N, K], or [N] for a binary classifier.
        name: Stands for the identity of the model, since there are no weights to hash.

    Raises:
        ModelError: In the forward pass, when the function raises or answers in another shape.

    >>> box = BlackBox(lambda x: x * 2.0)
    >>> box(torch.ones(1, 3, requires_grad=True))
    tensor([[2., 2., 2.]])
    """

    def __init__(self, function: Callable[[np.ndarray], Any], *, name: str = "") -> None:
        super().__init__()
        if not callable(function):
            raise ModelError(f"BlackBox needs a function from array to array, got a {type(function).__name__}.")
        self.function = function
        self.name = name or getattr(function, "__qualname__", type(function).__name__)
        self.train(False)

    @classmethod
    def from_probabilities(cls, function: Callable[[np.ndarray], Any], *, name: str = "") -> BlackBox:
        """For a function that answers probabilities [N, K]; their logarithms are the logits."""
        tiny = float(np.finfo(np.float32).tiny)  # keeps a probability of zero finite

        def logits(x: np.ndarray) -> np.ndarray:
            return np.log(np.maximum(np.asarray(function(x), dtype=np.float64), tiny))

        return cls(logits, name=name or getattr(function, "__qualname__", ""))

    @classmethod
    def from_labels(cls, function: Callable[[np.ndarray], Any], classes: int, *, name: str = "") -> BlackBox:
        """For a function that answers only labels [N]; the logits are 1 at the label and 0 elsewhere."""

        def logits(x: np.ndarray) -> np.ndarray:
            labels = np.asarray(function(x))
            if labels.shape != (len(x),) or labels.dtype.kind not in "iu":
                raise ModelError(
                    f"the black box answered {labels.dtype} of shape {list(labels.shape)}; "
                    f"labels must be whole numbers of shape [{len(x)}]."
                )
            if labels.size and (labels.min() < 0 or labels.max() >= classes):
                raise ModelError(
                    f"the black box answered labels {labels.min()} to {labels.max()}; "
                    f"{classes} classes allow 0 to {classes - 1}."
                )
            return np.eye(classes, dtype=np.float32)[labels]

        return cls(logits, name=name or getattr(function, "__qualname__", ""))

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

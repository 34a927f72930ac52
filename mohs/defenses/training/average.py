"""The exponential average of the weights along a training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The weights of all steps so far, the more recent ones counting more.

        average_n = sum over k <= n of decay^(n - k) w_k  /  sum over k <= n of decay^(n - k)

    It is less noisy than the last weights and usually more robust, at the end of training above all. Batch statistics
    are averaged as well; counters are copied. The weights before the first step do not count, so that a short training
    is not held back by its random beginning.

    Args:
        decay: of a step's weight with every further one, in (0, 1).
        model: whose weights.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> average = Average(0.5, net)
    >>> for n, value in enumerate((1.0, 4.0), 1):
    ...     _ = net.weight.data.fill_(value)
    ...     average.add(net, n)
    >>> float(average.state["weight"])  # (0.5 * 1 + 1 * 4) / 1.5
    3.0

    **Differs from the paper**: the normalisation, where the paper begins with the initial weights.
    **Source**: B. Polyak, A. Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J. Control Optim.
    1992; in adversarial training S. Gowal et al., "Uncovering the limits of adversarial training against norm-bounded
    adversarial examples", 2020 (arXiv 2010.03593), on model weight averaging.
    """

    def __init__(self, decay: float, model: nn.Module) -> None:
        self.decay = decay
        self.state: dict[str, Tensor] = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def add(self, model: nn.Module, n: int) -> None:
        """Count the weights after the ``n``-th step, n >= 1."""
        weight = (1 - self.decay) / (1 - self.decay**n)
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, weight)
            else:
                self.state[name].copy_(value)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved ``state``."""
        for name, value in self.state.items():
            value.copy_(state[name])

    @contextmanager
    def worn(self, model: nn.Module) -> Iterator[None]:
        """The model has the average's weights inside, and its own again afterwards, bit by bit."""
        own = {k: v.detach().clone() for k, v in model.state_dict().items()}
        model.load_state_dict(self.state)
        try:
            yield
        finally:
            model.load_state_dict(own)

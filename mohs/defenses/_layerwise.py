"""Detectors with one number per layer, and a logistic regression over the layers: LID and Mahalanobis."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from mohs.defenses._base import Defended
from mohs.defenses._detector import BATCH, Detector, calibrated
from mohs.defenses._examples import Shares, noisy
from mohs.errors import UsageError

FIT_STEPS = 200
"""Iterations of the logistic regression at most; it has as many weights as there are layers."""
RIDGE = 1e-3
"""Weight of the squared coefficients, so that separable examples have a solution."""


class LayerState(nn.Module):
    """The layers by name, the range of each layer's number, the regression, and the threshold."""

    def __init__(self, names: list[str], like: Tensor) -> None:
        super().__init__()
        self.names = names
        for name, value in (("low", 0.0), ("width", 1.0), ("coefficients", 0.0)):
            self.register_buffer(name, like.new_full((len(names),), value))
        self.register_buffer("intercept", like.new_zeros(()))
        self.register_buffer("threshold", like.new_zeros(()))


class LayerDetector(Detector):
    """Rejects on the log-odds of a logistic regression over one number per layer; a subclass ``measures`` these numbers."""

    fpr: float

    @abstractmethod
    def measure(self, classifier: nn.Module, state: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K] and the number of each layer [B, L]; differentiable."""

    def score(self, classifier: nn.Module, state: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K] and the log-odds that an input is adversarial [B]."""
        logits, numbers = self.measure(classifier, state, x)
        return logits, ((numbers - state.low) / state.width) @ state.coefficients + state.intercept

    def regressed(
        self, model: nn.Module, state: Any, x: Tensor, changed: Tensor, shares: Shares, seed: int
    ) -> Defended:
        """The defended model, once the state can measure: the regression of adversarial on clean and noisy, and the threshold."""
        clean, adversarial = x[shares.taught], changed[shares.taught]
        with torch.no_grad():
            usual, unusual = (
                torch.cat([self.measure(model, state, part)[1] for part in whole.split(BATCH)])
                for whole in (torch.cat([clean, noisy(clean, adversarial, seed)]), adversarial)
            )
        both = torch.cat([usual, unusual])
        state.low = both.amin(0)
        state.width = (both.amax(0) - state.low).clamp_min(1e-12)
        state.coefficients, state.intercept = regression(
            (both - state.low) / state.width, torch.cat([usual.new_zeros(len(usual)), usual.new_ones(len(unusual))])
        )
        state.threshold = calibrated(self._scored(model, state, x[shares.held]), self.fpr, type(self).__name__)
        return self.fitted(model, state)


def check_layers(layers: object, name: str) -> None:
    """Refuse a text where a tuple of names is meant.

    Raises:
        UsageError: it is one.
    """
    if isinstance(layers, str):
        raise UsageError(
            f"layers of {name} must be names in a tuple, or None; got the text {layers!r}. Give ({layers!r},)."
        )


def regression(features: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [L] and bias of a logistic regression in which both kinds weigh the same."""
    weight, bias = torch.zeros_like(features[0], requires_grad=True), features.new_zeros((), requires_grad=True)
    balance = torch.where(label > 0, (label == 0).sum() / label.sum(), 1.0)
    solver = torch.optim.LBFGS([weight, bias], max_iter=FIT_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        z = features @ weight + bias
        value = nn.functional.binary_cross_entropy_with_logits(z, label, weight=balance) + RIDGE * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return weight.detach(), bias.detach()

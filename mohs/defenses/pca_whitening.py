"""Detection by the last principal components."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mohs.defenses._base import Defended
from mohs.defenses._detector import HELD, Detector, calibrated, check_mode, held_out
from mohs.defenses._settings import number
from mohs.errors import DataError
from mohs.target import classify


class PCAWhiteningState(nn.Module):
    """The mean image [D], the whitened components that are looked at [D, t], and the threshold."""

    def __init__(self, mean: Tensor, whiten: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("whiten", whiten)
        self.register_buffer("threshold", mean.new_zeros(()))


@dataclass(frozen=True)
class PCAWhitening(Detector):
    """Rejects inputs that move where clean ones hardly ever do: along the last principal components.

        w = (S + ridge)^(-1/2) U^T (x - mean),   score = log var(w_j over the last components j)

    U and S are eigenvectors and eigenvalues of the covariance of clean inputs, so each w_j has variance 1 there. A change of all pixels
    that ignores the detector has as much of the last components as of the first, and these are divided by little. It looks at the
    input alone. The score is a smooth function of it, so an attack can keep it small; Carlini and Wagner found that on MNIST it sees
    little more than that pixels of the border, which are always 0, were touched.

    Args:
        tail: share of the components that is looked at, those of least variance; at least two.
        ridge: variance that is added to that of each component, in squared units of the input, so that a pixel which never
            changes is not divided by 0; the default is about that of the rounding to 8 bits.
        fpr: share of clean inputs to reject, above 0 and below 1; the threshold is an order statistic of clean examples held out
            for it.

    Raises:
        DataError: too few examples for a threshold that holds its rate, or no more than input values to learn from: the last components
            would then be directions that were never seen. Scores that are not finite.
        UsageError: called before ``fit``; settings that cannot be; a model in training mode.

    Cost: a pass, and D * tail * D multiplications for D input values. ``fit``: D^3, a second for 784 of them, ten for 3,072.

    >>> import mohs
    >>> from mohs.defenses import PCAWhitening
    >>> data = mohs.data.load("bundled:fashion-mnist", n=400)
    >>> small = data.x[:, :, ::2, ::2]  # 196 pixels
    >>> net = mohs.models.nets.small_cnn(size=14).eval()
    >>> guarded = PCAWhitening().fit(net, small)
    >>> noisy = (small + 0.1 * torch.randn(small.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    >>> bool((guarded(noisy).argmax(1) == 10).float().mean() > 0.9)
    True

    **Differs from the paper**: the logarithm, which changes no decision; a ridge; the threshold. The paper looks at the components from
    the 700th of 784, the 2,500th of 3,072 or the 10,000th of 12,288: a tail of 0.11 to 0.19.
    **Source**: D. Hendrycks, K. Gimpel, "Early methods for detecting adversarial images", ICLR 2017 workshop, the section on PCA
    whitening; how it fell: N. Carlini, D. Wagner, "Adversarial examples are not easily detected", AISec 2017, the section on principal
    components of the input.
    """

    tail: float = 0.1
    ridge: float = 1e-6
    fpr: float = 0.05

    def __post_init__(self) -> None:
        number(self.tail, "tail of PCAWhitening", 0, 1, above=True)
        number(self.ridge, "ridge of PCAWhitening", 0, above=True)
        number(self.fpr, "fpr of PCAWhitening", 0, 1, above=True, below=True)

    def fit(self, model: nn.Module, x: Tensor, *, seed: int = 0) -> Defended:
        """The model with a detector that was fitted on these examples, which must not be those it is tested on.

        Args:
            model: a classifier in eval mode.
            x: clean training inputs [N, ...]: three quarters for the components, one for the threshold.
            seed: of the choice of examples.
        """
        check_mode(model, "PCAWhitening")
        taught, held = held_out(x, self.fpr, "PCAWhitening", seed)
        rows = taught.flatten(1).double()
        n, size = rows.shape
        if n <= size:
            raise DataError(
                f"PCAWhitening needs more examples to learn from than input values, {size}; got {n}, three quarters of {len(x)}. Give "
                f"{math.ceil((size + 1) / (1 - HELD))} or more, or smaller inputs."
            )
        mean = rows.mean(0)
        variance, axes = torch.linalg.eigh((rows - mean).T @ (rows - mean) / (n - 1))
        count = min(max(2, round(self.tail * size)), size)
        # eigenvalues come in ascending order; of an axis and its opposite, the one whose largest entry is positive
        variance, axes = variance[:count].clamp_min(0), axes[:, :count]
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        state = PCAWhiteningState(mean.to(x.dtype), (axes / (variance + self.ridge).sqrt()).to(x.dtype))
        state.threshold = calibrated(self._scored(model, state, held), self.fpr, "PCAWhitening")
        return self.fitted(model, state)

    def score(self, classifier: nn.Module, state: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K] and the logarithm of the variance over the last whitened coefficients [B]."""
        coefficients = (x.flatten(1) - state.mean) @ state.whiten
        spread = (coefficients - coefficients.mean(1, keepdim=True)).square().mean(1)
        return classify(classifier, x), spread.clamp_min(torch.finfo(spread.dtype).tiny).log()

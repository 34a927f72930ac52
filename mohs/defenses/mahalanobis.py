"""Detection by the Mahalanobis distance to the nearest class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mohs.defenses._base import Defended, as_deployed
from mohs.defenses._detector import BATCH, activations, check_mode, weighted
from mohs.defenses._examples import deal, labelled
from mohs.defenses._layerwise import LayerDetector, LayerState, check_layers
from mohs.defenses._settings import number
from mohs.errors import DataError, ModelError, gist


class Gaussians(nn.Module):
    """Class-conditional Gaussians with one covariance, as the axes along which all of them are round and of unit width."""

    origin: Tensor
    axes: Tensor
    centres: Tensor

    def __init__(self, features: Tensor, y: Tensor) -> None:
        """Fit them to features [n, D] of classes y [n]."""
        super().__init__()
        exact = features.double()
        means = torch.stack([exact[y == k].mean(0) for k in y.unique()])
        around = exact - means[(y.unsqueeze(1) == y.unique()).long().argmax(1)]
        variance, directions = torch.linalg.eigh(around.T @ around / len(exact))
        # what varies no more than by rounding says nothing, and its inverse would drown all else
        real = variance > variance[-1] * len(variance) * torch.finfo(features.dtype).eps
        axes = directions * torch.where(real, variance, torch.inf).rsqrt()
        origin = exact.mean(0)
        self.register_buffer("origin", origin.to(features))
        self.register_buffer("axes", axes.to(features))
        self.register_buffer("centres", ((means - origin) @ axes).to(features))

    def forward(self, features: Tensor) -> Tensor:
        """Squared Mahalanobis distance to the nearest class, [B]."""
        points = (features - self.origin) @ self.axes
        return torch.cdist(points, self.centres, compute_mode="donot_use_mm_for_euclid_dist").amin(1).square()


class MahalanobisState(LayerState):
    """What was learnt: the Gaussians of each layer, the range of each layer's distance, the regression, and the threshold."""

    def __init__(self, names: list[str], features: list[Tensor], y: Tensor) -> None:
        super().__init__(names, features[0])
        self.gaussians = nn.ModuleList(Gaussians(f, y) for f in features)


@dataclass(frozen=True)
class Mahalanobis(LayerDetector):
    """Rejects inputs that are far, in the layers of the net, from the Gaussian of every class.

        M(a) = min_c (a - mu_c)^T S^-1 (a - mu_c),   x_l = x - magnitude * sign(grad M_l(x)),   score = sum_l w_l M_l(x_l) + b

    mu_c are the means of the classes and S the covariance around them, one for all, of a layer's activations averaged over
    places. Before a layer is measured, the input makes a small step towards the nearest class: clean inputs gain more from it. A
    logistic regression over the layers is fitted on adversarial against clean and noisy examples. It tells what resembles
    the attacks that it was fitted on; an attack that descends the distance beside its loss passes. The score has gradients, so
    attacks need no stand-in: the step is a constant to them.

    Args:
        magnitude: length of the step per value of the input, in its units; 0: no step.
        fpr: share of clean inputs to reject, above 0 and below 1; the threshold is an order statistic of clean examples held out
            for it.
        layers: names; None: all leaf layers with weights.

    Raises:
        DataError: fewer examples than are needed, no adversarial one among them, flags that are not bool, or labels that are
            not int64; activations that do not vary.
        UsageError: called before ``fit``; layers that do not exist; a model in training mode.
        ModelError: at the first call, where there is a step and the classifier has no input gradient.

    Cost: a pass; with a step, for L layers, 1 + L more passes and L backwards.

    >>> import mohs
    >>> from mohs.defenses import Mahalanobis
    >>> net, data = mohs.models.load("bundled:fashion-natural"), mohs.data.load("bundled:fashion-mnist", n=240)
    >>> found = mohs.attack(mohs.attacks.FGSM(), net, data.x, data.y, "linf:0.1")
    >>> guarded = Mahalanobis().fit(net, data.x, data.y, found.x, found.success)
    >>> guarded(data.x[:4]).shape  # ten classes, and the rejection
    torch.Size([4, 11])

    **Differs from the paper**: the sign and the factor 1/2 of the distance, which the regression absorbs; a value whose gradient
    is zero makes no step. The magnitude is a setting, not chosen on adversarial examples. One half of the examples gives the
    Gaussians, one half of the rest the regression, which weighs both kinds alike and has a small ridge; layers are all with
    weights, before their nonlinearity. The threshold is chosen on held-out clean examples, where the paper reports curves.
    **Source**: K. Lee, K. Lee, H. Lee, J. Shin, "A simple unified framework for detecting out-of-distribution samples and
    adversarial attacks", NeurIPS 2018, the sections on the confidence score, input pre-processing and feature ensemble, and its code
    (the covariance's pseudo-inverse, averages over places, noisy examples).
    """

    magnitude: float = 0.001
    fpr: float = 0.05
    layers: tuple[str, ...] | None = None
    looks_at_gradients: ClassVar[bool] = True
    taught_by: ClassVar[str] = "x, y, changed"

    def __post_init__(self) -> None:
        number(self.magnitude, "magnitude of Mahalanobis", 0)
        number(self.fpr, "fpr of Mahalanobis", 0, 1, above=True, below=True)
        check_layers(self.layers, "Mahalanobis")
        object.__setattr__(self, "looks_at_gradients", self.magnitude > 0)

    def fit(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        changed: Tensor,
        broken: Tensor | None = None,
        *,
        seed: int = 0,
    ) -> Defended:
        """The model with a detector that was fitted on these examples, which must not be those it is tested on.

        Args:
            model: a classifier in eval mode.
            x: clean training inputs [N, ...]: one half for the Gaussians, a quarter each for the regression and the threshold.
            y: their classes, int64 [N].
            changed: adversarial versions of the same, such as ``mohs.attack(...).x``.
            broken: which of those are adversarial indeed, bool [N]; None: all.
            seed: of the choice of examples and of the noise.
        """
        check_mode(model, "Mahalanobis")
        labelled("Mahalanobis", x, y)
        shares = deal("Mahalanobis", x, changed, broken, len(x) // 2, self.fpr, seed)
        names = list(self.layers) if self.layers is not None else weighted(model)
        with torch.no_grad():
            parts = [activations(model, names, part, averaged)[1] for part in x[shares.kept].split(BATCH)]
        features = [torch.cat(layer) for layer in zip(*parts, strict=True)]
        constant = [
            n for n, f in zip(names, features, strict=True) if not bool(f.isfinite().all() & (f != f[:1]).any())
        ]
        if constant:
            raise DataError(
                f"Activations of the layers {', '.join(constant)} are the same for all {len(shares.kept)} examples, or not finite: "
                "they have no Gaussian. Name other layers, or give other examples."
            )
        return self.regressed(model, MahalanobisState(names, features, y[shares.kept]), x, changed, shares, seed)

    def measure(self, classifier: nn.Module, state: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K] and the squared distance to the nearest class in each layer [B, L]."""
        if not self.magnitude:
            logits, seen = activations(classifier, state.names, x, averaged)
            return logits, torch.stack([g(f) for g, f in zip(state.gaussians, seen, strict=True)], 1)
        distances = []
        for name, gaussians, way in zip(state.names, state.gaussians, self._ways(classifier, state, x), strict=True):
            _, (features,) = activations(classifier, [name], x - self.magnitude * way, averaged)
            distances.append(gaussians(features))
        return activations(classifier, [], x)[0], torch.stack(distances, 1)

    def _ways(self, classifier: nn.Module, state: Any, x: Tensor) -> list[Tensor]:
        """Per layer the sign of the gradient of the distance, [B, ...]."""
        # the deployed model's own gradients, or the step, and with it the answer, would depend on who asks
        with torch.inference_mode(False), torch.enable_grad(), as_deployed(classifier):
            point = x.detach().clone().requires_grad_(True)
            _, seen = activations(classifier, state.names, point, averaged)
            found = []
            for gaussians, features in zip(state.gaussians, seen, strict=True):
                try:
                    (g,) = torch.autograd.grad(gaussians(features).sum(), point, retain_graph=True)
                except RuntimeError as error:
                    raise ModelError(
                        f"Mahalanobis steps along the classifier's input gradient, and there is none ({gist(error)}). What stands "
                        "between it and the classifier must be differentiable: put codecs and filters without gradient outside of "
                        "it, or give magnitude=0."
                    ) from error
                found.append(g.sign())
        return found


def averaged(value: Tensor) -> Tensor:
    """What a layer answers, [B, C, ...], averaged over places: [B, C]."""
    return value.flatten(2).mean(2) if value.dim() > 2 else value

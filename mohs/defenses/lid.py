"""Detection by local intrinsic dimensionality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mohs.defenses._base import Defended
from mohs.defenses._detector import BATCH, activations, check_mode, weighted
from mohs.defenses._examples import deal
from mohs.defenses._layerwise import LayerDetector, LayerState, check_layers
from mohs.defenses._settings import number


class LIDState(LayerState):
    """What was learnt: reference activations by layer, the range of each layer's LID, the regression, and the threshold."""

    def __init__(self, names: list[str], references: list[Tensor]) -> None:
        super().__init__(names, references[0])
        for i, reference in enumerate(references):
            self.register_buffer(f"reference_{i}", reference)

    @property
    def references(self) -> list[Tensor]:
        """Activations [m, D] of the reference examples, by layer."""
        return [getattr(self, f"reference_{i}") for i in range(len(self.names))]


@dataclass(frozen=True)
class LID(LayerDetector):
    """Rejects inputs around which the training data look high-dimensional, in the layers of the net.

        LID(a) = -( 1/k * sum_(i <= k) log(r_i(a) / r_k(a)) )^-1,      score = w . LID + b

    r_i(a) is the distance from the activation a of a layer to its i-th nearest of some reference examples; one LID per layer,
    and a logistic regression over the layers, fitted on adversarial against clean and noisy examples. It tells the attacks that
    it was fitted on; Athalye, Carlini and Wagner broke it by an attack of high confidence that does not even look at it.
    The score has gradients, so attacks need no stand-in.

    Args:
        k: neighbours.
        references: examples whose activations are kept, drawn from the training data.
        fpr: share of clean inputs to reject, above 0 and below 1; the threshold is an order statistic of clean examples held out
            for it.
        layers: names; None: all leaf layers with weights.

    Raises:
        DataError: fewer examples than are needed, no adversarial one among them, or flags that are not bool.
        UsageError: called before ``fit``; layers that do not exist; a model in training mode.

    Cost: a pass, and the distances of each layer's answer to the references.

    >>> import mohs
    >>> from mohs.defenses import LID
    >>> net, data = mohs.models.load("bundled:fashion-natural"), mohs.data.load("bundled:fashion-mnist", n=240)
    >>> found = mohs.attack(mohs.attacks.FGSM(), net, data.x, data.y, "linf:0.1")
    >>> guarded = LID(k=10, references=50).fit(net, data.x, found.x, found.success)
    >>> guarded(data.x[:4]).shape  # ten classes, and the rejection
    torch.Size([4, 11])

    **Differs from the paper**: one fixed set of references that holds neither the inputs nor their clean twins (in the published
    code the adversarial example's own clean twin is among them); the threshold is chosen on held-out clean examples. The regression
    weighs both kinds alike and has a small ridge. Clean and noisy examples are taken of the broken ones alone, and noise is not
    clipped to the box.
    **Source**: X. Ma et al., "Characterizing adversarial subspaces using local intrinsic dimensionality", ICLR 2018, equation 4 and
    algorithm 1; how it fell: A. Athalye, N. Carlini, D. Wagner, ICML 2018, section 5.4.
    """

    k: int = 20
    references: int = 100
    fpr: float = 0.05
    layers: tuple[str, ...] | None = None
    taught_by: ClassVar[str] = "x, changed"

    def __post_init__(self) -> None:
        number(self.k, "k of LID", 2, whole=True)
        number(self.references, "references of LID", self.k, whole=True)
        number(self.fpr, "fpr of LID", 0, 1, above=True, below=True)
        check_layers(self.layers, "LID")

    def fit(
        self, model: nn.Module, x: Tensor, changed: Tensor, broken: Tensor | None = None, *, seed: int = 0
    ) -> Defended:
        """The model with a detector that was fitted on these examples, which must not be those it is tested on.

        Args:
            model: a classifier in eval mode.
            x: clean training inputs [N, ...]: the references, then one half of the rest for the regression, the other for the
                threshold.
            changed: adversarial versions of the same, such as ``mohs.attack(...).x``.
            broken: which of those are adversarial indeed, bool [N]; None: all.
            seed: of the choice of examples and of the noise.
        """
        check_mode(model, "LID")
        shares = deal("LID", x, changed, broken, self.references, self.fpr, seed)
        names = list(self.layers) if self.layers is not None else weighted(model)
        with torch.no_grad():
            parts = [activations(model, names, part)[1] for part in x[shares.kept].split(BATCH)]
        state = LIDState(names, [torch.cat(layer) for layer in zip(*parts, strict=True)])
        return self.regressed(model, state, x, changed, shares, seed)

    def measure(self, classifier: nn.Module, state: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K] and the LID in each layer [B, L]."""
        logits, seen = activations(classifier, state.names, x)
        return logits, torch.stack([lid(a, r, self.k) for a, r in zip(seen, state.references, strict=True)], 1)


def lid(points: Tensor, references: Tensor, k: int) -> Tensor:
    """Maximum-likelihood estimate of the local intrinsic dimensionality at points [B, D] among references [m, D], [B].

    >>> line = torch.arange(1.0, 101.0).unsqueeze(1)  # distances from 0 are uniform on a line: dimension 1
    >>> round(float(lid(torch.zeros(1, 1), line, 100)), 1)
    1.0
    """
    distance = torch.cdist(points, references, compute_mode="donot_use_mm_for_euclid_dist")
    near = distance.topk(k, dim=1, largest=False).values.clamp_min(1e-12)
    return -1 / (near / near[:, -1:]).log().mean(1).clamp_max(-1e-6)

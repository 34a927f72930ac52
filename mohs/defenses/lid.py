"""Detection by local intrinsic dimensionality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mohs import streams
from mohs.defenses._base import Defended
from mohs.defenses._detector import BATCH, Detector, activations, calibrated, check_mode, weighted
from mohs.defenses._settings import number
from mohs.errors import DataError, UsageError

LEAST = 20
"""Examples beyond the references at least."""
FIT_STEPS = 200
"""Iterations of the logistic regression at most; it has as many weights as there are layers."""
RIDGE = 1e-3
"""Weight of the squared coefficients, so that separable examples have a solution."""


class LIDState(nn.Module):
    """What was learnt: reference activations by layer, the range of each layer's LID, the regression, and the threshold."""

    def __init__(self, names: list[str], references: list[Tensor]) -> None:
        super().__init__()
        self.names = names
        for i, reference in enumerate(references):
            self.register_buffer(f"reference_{i}", reference)
        for name, value in (("low", 0.0), ("width", 1.0), ("weight", 0.0)):
            self.register_buffer(name, references[0].new_full((len(names),), value))
        self.register_buffer("bias", references[0].new_zeros(()))
        self.register_buffer("threshold", references[0].new_zeros(()))

    @property
    def references(self) -> list[Tensor]:
        """Activations [m, D] of the reference examples, by layer."""
        return [getattr(self, f"reference_{i}") for i in range(len(self.names))]


@dataclass(frozen=True)
class LID(Detector):
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
        if isinstance(self.layers, str):
            raise UsageError(
                f"layers of LID must be names in a tuple, or None; got the text {self.layers!r}. Give ({self.layers!r},)."
            )

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
        broken = torch.ones(len(x), dtype=torch.bool, device=x.device) if broken is None else broken
        check_mode(model, "LID")
        if broken.dtype != torch.bool:
            raise DataError(
                f"broken must be bool, one flag per example; got {broken.dtype}. Give a tensor such as mohs.attack(...).success, or "
                "broken.bool()."
            )
        if changed.shape != x.shape or broken.shape != x.shape[:1]:
            raise DataError(
                f"LID needs one changed input, and one flag, for each of the {len(x)} clean ones; got shapes {tuple(x.shape)}, "
                f"{tuple(changed.shape)} and {tuple(broken.shape)}."
            )
        rest = len(x) - self.references
        if rest < LEAST:
            raise DataError(
                f"LID needs its {self.references} references and at least {LEAST} further examples; got {len(x)}. Give more, or "
                "fewer references."
            )
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
        kept, taught, held = (
            order[: self.references],
            order[self.references :][: rest // 2],
            order[self.references + rest // 2 :],
        )
        taught = taught[broken[taught]]
        if not len(taught):
            raise DataError(
                f"None of the {rest // 2} examples to learn from is adversarial. Give a stronger attack, or a larger radius."
            )
        names = list(self.layers) if self.layers is not None else weighted(model)
        with torch.no_grad():
            parts = [activations(model, names, part)[1] for part in x[kept].split(BATCH)]
        state = LIDState(names, [torch.cat(layer) for layer in zip(*parts, strict=True)])
        clean, changed = x[taught], changed[taught]
        noise = streams.normal(streams.derive(streams.content_keys(clean), seed), tuple(x.shape[1:]), dtype=x.dtype)
        length = (changed - clean).flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)
        noisy = clean + noise * length.view(-1, *[1] * (x.dim() - 1))
        with torch.no_grad():
            usual, unusual = (
                torch.cat([self._lids(model, state, part)[1] for part in whole.split(BATCH)])
                for whole in (torch.cat([clean, noisy]), changed)
            )
        both = torch.cat([usual, unusual])
        state.low = both.amin(0)
        state.width = (both.amax(0) - state.low).clamp_min(1e-12)
        state.weight, state.bias = _regression(
            (both - state.low) / state.width, torch.cat([usual.new_zeros(len(usual)), usual.new_ones(len(unusual))])
        )
        state.threshold = calibrated(self._scored(model, state, x[held]), self.fpr, "LID")
        return self.fitted(model, state)

    def score(self, classifier: nn.Module, state: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K] and the log-odds that an input is adversarial [B]."""
        logits, lids = self._lids(classifier, state, x)
        return logits, ((lids - state.low) / state.width) @ state.weight + state.bias

    def _lids(self, classifier: nn.Module, state: Any, x: Tensor) -> tuple[Tensor, Tensor]:
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


def _regression(features: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
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

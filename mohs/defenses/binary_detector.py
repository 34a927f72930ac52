"""Detection by a small net on an inner layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mohs.defenses._base import Defended
from mohs.defenses._descent import descend
from mohs.defenses._detector import Detector, activations, calibrated, check_mode, least, weighted
from mohs.defenses._examples import deal, labelled
from mohs.defenses._settings import number
from mohs.defenses.dynamic_adversary import DynamicAdversary
from mohs.defenses.training._quiet import evaluating, seeded
from mohs.errors import DataError, UsageError

BATCH = 128
"""Examples per step of the training."""
SMALL = 8
"""Maps of at most so many places a side are not pooled."""


class BinaryState(nn.Module):
    """The layer by name, the small net, and the threshold."""

    threshold: Tensor

    def __init__(self, name: str, net: nn.Module, like: Tensor) -> None:
        super().__init__()
        self.name, self.net = name, net
        self.register_buffer("threshold", like.new_zeros(()))


@dataclass(frozen=True)
class BinaryDetector(Detector):
    """Rejects what a small net, on the activations of one layer, takes for adversarial.

        score = log-odds of 'adversarial' = subnetwork(activations of the layer)

    The classifier stays as it is; the subnetwork learns to tell its clean from its adversarial inputs. ``fit`` trains it on
    adversarial inputs that are given: then it knows that attack and its like. ``fit_dynamic`` trains it against an adversary
    that attacks classifier and detector jointly and anew in every batch, which is harder to learn and to evade; that too fell to
    attacks with more confidence. The score has gradients, so attacks need no stand-in.

    Args:
        layer: name of the layer whose answers it sees; None: the middle one of the leaf layers with weights.
        width: channels of its first convolution; the others have twice as many.
        epochs: passes over the training examples.
        lr: step size of Adam.
        fpr: share of clean inputs to reject, above 0 and below 1; the threshold is an order statistic of clean examples held out
            for it.

    Raises:
        DataError: fewer examples than are needed, no adversarial one among them, flags that are not bool, or labels that are
            not int64.
        UsageError: called before ``fit``; a layer that does not exist; a model in training mode.
        ModelError: the training diverged.

    Cost: a pass, and one of the subnetwork.

    >>> import mohs
    >>> from mohs.defenses import BinaryDetector, DynamicAdversary
    >>> net, data = mohs.models.load("bundled:fashion-natural"), mohs.data.load("bundled:fashion-mnist", n=240)
    >>> found = mohs.attack(mohs.attacks.FGSM(), net, data.x, data.y, "linf:0.1")
    >>> guarded = BinaryDetector(width=8, epochs=2).fit(net, data.x, found.x, found.success)
    >>> guarded(data.x[:4]).shape  # ten classes, and the rejection
    torch.Size([4, 11])
    >>> adversary = DynamicAdversary("linf:0.1", steps=2)
    >>> guarded = BinaryDetector(width=8, epochs=2).fit_dynamic(net, data.x, data.y, adversary)

    **Differs from the paper**: the subnetwork answers one logit, not two; each of its poolings is left out where the map has no
    more than 8 x 8 places, and layers without places count as maps of one. The threshold is chosen on held-out clean examples, and
    is not a probability of one half. Adam's step size is larger, as there are fewer steps. In ``fit`` clean examples are taken of the
    broken ones alone.
    **Source**: J. H. Metzen, T. Genewein, V. Fischer, B. Bischoff, "On detecting adversarial perturbations", ICLR 2017, figure 1 and
    the section on dynamic adversary training; how it fell: N. Carlini, D. Wagner, "Adversarial examples are not easily detected:
    bypassing ten detection methods", AISec 2017.
    """

    layer: str | None = None
    width: int = 96
    epochs: int = 20
    lr: float = 1e-3
    fpr: float = 0.05
    taught_by: ClassVar[str] = "x, changed"

    def __post_init__(self) -> None:
        number(self.width, "width of BinaryDetector", 1, whole=True)
        number(self.epochs, "epochs of BinaryDetector", 1, whole=True)
        number(self.lr, "lr of BinaryDetector", 0, above=True)
        number(self.fpr, "fpr of BinaryDetector", 0, 1, above=True, below=True)
        if self.layer is not None and not isinstance(self.layer, str):
            raise UsageError(f"layer of BinaryDetector must be the name of one layer, or None; got {self.layer!r}.")

    def fit(
        self, model: nn.Module, x: Tensor, changed: Tensor, broken: Tensor | None = None, *, seed: int = 0
    ) -> Defended:
        """The model with a detector that was trained on these examples, which must not be those it is tested on.

        Args:
            model: a classifier in eval mode.
            x: clean training inputs [N, ...]: one half for the training, the other for the threshold.
            changed: adversarial versions of the same, such as ``mohs.attack(...).x``.
            broken: which of those are adversarial indeed, bool [N]; None: all.
            seed: of the choice of examples, of the weights and of the order.
        """
        check_mode(model, "BinaryDetector")
        shares = deal("BinaryDetector", x, changed, broken, 0, self.fpr, seed)
        inputs = torch.cat([x[shares.taught], changed[shares.taught]])
        labels = torch.cat([inputs.new_zeros(len(shares.taught)), inputs.new_ones(len(shares.taught))])
        state = self._begin(model, x, seed)

        def loss(rows: Tensor, generator: torch.Generator) -> Tensor:
            at = rows.to(x.device)
            with torch.no_grad():
                _, (seen,) = activations(model, [state.name], inputs[at], as_map)
            return F.binary_cross_entropy_with_logits(odds_of(state, seen), labels[at])

        return self._train(model, state, loss, len(inputs), x[shares.held], seed)

    def fit_dynamic(
        self, model: nn.Module, x: Tensor, y: Tensor, adversary: DynamicAdversary, *, seed: int = 0
    ) -> Defended:
        """The model with a detector that was trained against an adversary that knows it.

        In each batch an example is moved with probability one half, with a sigma drawn uniformly from [0, 1] for it.

        Args:
            model: a classifier in eval mode.
            x: clean training inputs [N, ...]: one half for the training, the other for the threshold.
            y: their classes, int64 [N].
            adversary: what it is trained against.
            seed: of the choice of examples, of the weights, of the order, and of what the adversary draws.
        """
        check_mode(model, "BinaryDetector")
        labelled("BinaryDetector", x, y)
        if len(x) < 2 * least(self.fpr):
            raise DataError(
                f"BinaryDetector needs at least {2 * least(self.fpr)} examples, one half of them for a threshold at a false-positive "
                f"rate of {self.fpr:g}; got {len(x)}. Give more, or a higher rate."
            )
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
        taught, held = order[: len(x) // 2], order[len(x) // 2 :]
        state = self._begin(model, x, seed)

        def look(place: Tensor) -> tuple[Tensor, Tensor]:
            return self.score(model, state, place)

        def loss(rows: Tensor, generator: torch.Generator) -> Tensor:
            at = taught[rows.to(x.device)]
            moved = (torch.rand(len(rows), generator=generator) < 0.5).to(x.device)
            sigma = torch.rand(len(rows), generator=generator).to(x)
            inputs = x[at]
            if bool(moved.any()):
                with evaluating(state):
                    inputs[moved] = adversary.points(look, inputs[moved], y[at][moved], sigma[moved])
            with torch.no_grad():
                _, (seen,) = activations(model, [state.name], inputs, as_map)
            return F.binary_cross_entropy_with_logits(odds_of(state, seen), moved.to(x.dtype))

        return self._train(model, state, loss, len(taught), x[held], seed)

    def _begin(self, model: nn.Module, x: Tensor, seed: int) -> BinaryState:
        """An untrained subnetwork for the layer."""
        names = [self.layer] if self.layer is not None else weighted(model)
        name = names[(len(names) - 1) // 2]
        with torch.no_grad():
            _, (seen,) = activations(model, [name], x[:1], as_map)
        with seeded(seed, "BinaryDetector"):
            net = subnetwork(seen.shape[1], seen.shape[2:], self.width)
        return BinaryState(name, net.to(seen), seen)

    def _train(
        self,
        model: nn.Module,
        state: BinaryState,
        loss: Callable[[Tensor, torch.Generator], Tensor],
        n: int,
        held: Tensor,
        seed: int,
    ) -> Defended:
        state.train()
        descend(state.net.parameters(), loss, n, epochs=self.epochs, batch=BATCH, lr=self.lr, seed=seed)
        state.eval().requires_grad_(False)
        state.threshold = calibrated(self._scored(model, state, held), self.fpr, "BinaryDetector")
        return self.fitted(model, state)

    def score(self, classifier: nn.Module, state: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K] and the log-odds that an input is adversarial [B]."""
        logits, (seen,) = activations(classifier, [state.name], x, as_map)
        return logits, odds_of(state, seen)


def as_map(value: Tensor) -> Tensor:
    """What a layer answers as maps [B, C, H, W]: vectors as maps of one place, sequences [B, T, D] as D maps of T."""
    if value.dim() == 4:
        return value
    if value.dim() == 3:
        return value.transpose(1, 2).unsqueeze(3)
    return value.flatten(1).unsqueeze(2).unsqueeze(3)


def odds_of(state: BinaryState, seen: Tensor) -> Tensor:
    """Log-odds of 'adversarial', [B], from the layer's maps."""
    return state.net(seen).mean((2, 3)).squeeze(1)


def subnetwork(channels: int, size: tuple[int, ...], width: int) -> nn.Sequential:
    """From maps [B, C, H, W] to one map of log-odds [B, 1, h, w], whose mean over places is the answer.

    >>> [type(layer).__name__ for layer in subnetwork(16, (32, 32), 4)][:4]
    ['Conv2d', 'BatchNorm2d', 'ReLU', 'MaxPool2d']
    >>> subnetwork(16, (32, 32), 4).eval()(torch.zeros(2, 16, 32, 32)).shape
    torch.Size([2, 1, 8, 8])
    """

    def block(came: int, went: int) -> list[nn.Module]:
        return [nn.Conv2d(came, went, 3, padding=1), nn.BatchNorm2d(went), nn.ReLU()]

    layers, side = block(channels, width), min(size)
    for came in (width, 2 * width):
        if side > SMALL:
            layers.append(nn.MaxPool2d(2))
            side //= 2
        layers += block(came, 2 * width)
    return nn.Sequential(*layers, nn.Conv2d(2 * width, 1, 1))

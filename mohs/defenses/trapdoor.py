"""Detection by trapdoors: weaknesses planted in the net that attacks fall into, and that give them away."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mohs.defenses._base import Defended, rejecting
from mohs.defenses._descent import descend
from mohs.defenses._detector import Detector, activations, calibrated, check_mode, weighted
from mohs.defenses._examples import labelled
from mohs.defenses._settings import images, number, unit
from mohs.defenses.training._quiet import modes_kept, seeded
from mohs.errors import DataError, ModelError, UsageError
from mohs.target import classify

BATCH = 32
"""Examples per step of the training."""
LEARNT = 0.9
"""Share of triggered inputs that must lead to their class for the trapdoors to count as planted."""
SIGNED = 1000
"""Examples at most whose activations a signature averages."""


class TrapdoorState(nn.Module):
    """What was planted and learnt: triggers [K, T, C, H, W], signatures [K, T, D], limits [K], the neurons compared [D]."""

    masks: Tensor
    patterns: Tensor
    signatures: Tensor
    neurons: Tensor
    limits: Tensor
    threshold: Tensor

    def __init__(self, name: str, masks: Tensor, patterns: Tensor) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("masks", masks)
        self.register_buffer("patterns", patterns)
        for what in ("signatures", "neurons", "limits", "threshold"):
            self.register_buffer(what, masks.new_zeros(()))

    def triggered(self, x: Tensor, k: Tensor, which: Tensor) -> Tensor:
        """Inputs [B, C, H, W] with the trigger number ``which`` of the classes ``k``, [B] each."""
        mask = self.masks[k, which]
        return mask * self.patterns[k, which] + (1 - mask) * x


@dataclass(frozen=True)
class Trapdoor(Detector):
    """Plants triggers in a copy of the net that lead to each class, and rejects inputs whose activations resemble them.

        x' = m p + (1 - m) x,      S_k = mean of g(x') over inputs with a trigger of class k
        score_k = max over the class's triggers of cos(g(x), S_k) - phi_k,      rejected if the answer's score is above 0

    g is the activation of one layer, m the mask of a trigger (a few squares, nearly transparent) and p its pattern. ``fit``
    trains the copy on inputs of which a share has a trigger and that trigger's class for a label. An attack that follows the
    net's gradients finds these shortcuts first. One that descends the similarity beside its loss leaves them. Each class has a
    limit phi_k of its own. The score has gradients, so attacks need no stand-in.

    Args:
        traps: trapdoors of each class.
        squares: squares of a trigger, at random places; they may overlap.
        side: of a square, in pixels.
        strength: opacity of a trigger, above 0 and at most 1.
        share: of the training inputs that get a trigger, above 0 and below 1.
        epochs: passes over the training examples.
        lr: step size of Adam.
        neurons: share of the layer's neurons that are compared, above 0 and at most 1; which ones is drawn in ``fit``.
        fpr: share of clean inputs to reject, above 0 and below 1; the limits are order statistics of the clean examples held
            out for them.
        layer: name of the layer g; None: the last but one of the leaf layers with weights.

    Raises:
        DataError: too few examples, or labels that are not classes of the model.
        UsageError: called before ``fit``; a layer that does not exist; a model in training mode.
        ModelError: inputs that are no images in [0, 1]; the training diverged, or did not plant the trapdoors.

    Cost: a pass.

    >>> import mohs
    >>> from mohs.defenses import Trapdoor
    >>> net, data = mohs.models.load("bundled:fashion-natural"), mohs.data.load("bundled:fashion-mnist", n=400)
    >>> guarded = Trapdoor(strength=1.0, side=5, epochs=12, lr=0.005, fpr=0.3).fit(net, data.x, data.y)
    >>> guarded(data.x[:4]).shape  # ten classes, and the rejection
    torch.Size([4, 11])

    **Differs from the paper**: of several trapdoors of a class each has a signature, and the nearest counts (the published code has
    one mean signature); it averages at most 1,000 inputs, none of that class. The limits are order statistics of clean inputs to
    which the net gives that answer. The neurons compared are drawn once, as in the code. The logits of other classes are lowered
    by what their similarity would have over their threshold (see ``Detector``), so that the margin does not jump.
    **Source**: S. Shan et al., "Gotta catch 'em all: using honeypots to catch adversarial attacks on neural networks", CCS 2020, the
    sections on the design of trapdoors and on randomised neuron signatures, and its code (triggers, defaults); how it fell: N.
    Carlini, "A partial break of the honeypots defense to catch adversarial attacks", 2020.
    """

    traps: int = 1
    squares: int = 7
    side: int = 3
    strength: float = 0.1
    share: float = 0.5
    epochs: int = 10
    lr: float = 1e-3
    neurons: float = 1.0
    fpr: float = 0.05
    layer: str | None = None
    unit: ClassVar[bool] = True
    taught_by: ClassVar[str] = "x, y"

    def __post_init__(self) -> None:
        for name in ("traps", "squares", "side", "epochs"):
            number(getattr(self, name), f"{name} of Trapdoor", 1, whole=True)
        number(self.strength, "strength of Trapdoor", 0, 1, above=True)
        number(self.share, "share of Trapdoor", 0, 1, above=True, below=True)
        number(self.lr, "lr of Trapdoor", 0, above=True)
        number(self.neurons, "neurons of Trapdoor", 0, 1, above=True)
        number(self.fpr, "fpr of Trapdoor", 0, 1, above=True, below=True)
        if self.layer is not None and not isinstance(self.layer, str):
            raise UsageError(f"layer of Trapdoor must be the name of one layer, or None; got {self.layer!r}.")

    def fit(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int = 0) -> Defended:
        """A copy of the model with trapdoors in it and a detector for them; the model itself stays as it is.

        Args:
            model: a classifier in eval mode.
            x: clean training inputs [N, C, H, W] in [0, 1]: two thirds for the training, one third for the limits.
            y: their classes, int64 [N].
            seed: of the triggers, the choice of examples, the order, and the neurons.
        """
        check_mode(model, "Trapdoor")
        if rejecting(model):
            raise UsageError(
                "Trapdoor trains classes, and the last logit of this model is a rejection. Plant the trapdoors in the bare classifier, "
                "and fit the other detector on the model that comes back."
            )
        unit(images(x, "Trapdoor"))
        labelled("Trapdoor", x, y)
        if self.side > min(x.shape[2:]):
            raise DataError(
                f"Squares of side {self.side} do not fit images of {x.shape[2]} x {x.shape[3]} pixels. Give a smaller side."
            )
        name = self._layer(model)
        with torch.no_grad():
            classes = classify(model, x[:1]).shape[1]
        if not len(y) or int(y.amin()) < 0 or int(y.amax()) >= classes:
            raise DataError(f"Labels must be classes of the model, 0 to {classes - 1}; got others, or none.")
        generator = torch.Generator().manual_seed(seed)
        state = TrapdoorState(name, *(t.to(x) for t in self._triggers(classes, tuple(x.shape[1:]), generator)))
        order = torch.randperm(len(x), generator=generator).to(x.device)
        taught, held = order[len(x) // 3 :], order[: len(x) // 3]
        net = self._planted(model, state, x[taught], y[taught], seed)
        self._sign(net, state, x[taught], y[taught], generator)
        state.limits = self._limits(net, state, x[held])
        return self.fitted(net, state)

    def score(self, classifier: nn.Module, state: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K] and by how much the similarity to the trapdoors of each class is above its limit [B, K]."""
        logits, alike = self._alike(classifier, state, x)
        return logits, alike - state.limits

    def _alike(self, classifier: nn.Module, state: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K] and the similarity to the trapdoors of each class [B, K]."""
        logits, (seen,) = activations(classifier, [state.name], x)
        towards = F.normalize(state.signatures, dim=2)
        return logits, torch.einsum("bd,ktd->bkt", F.normalize(seen * state.neurons, dim=1), towards).amax(2)

    def _layer(self, model: nn.Module) -> str:
        if self.layer is not None:
            return self.layer
        names = weighted(model)
        if len(names) < 2:
            raise UsageError(
                f"Trapdoor looks at the layer before the last, and the model has one layer with weights alone: {names[0]}. "
                "Name a layer."
            )
        return names[-2]

    def _triggers(self, classes: int, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Masks [K, T, 1, H, W] and patterns [K, T, C, H, W]: squares of clipped Gaussian noise, each with its own mean and width."""
        _, height, width = shape
        masks = torch.zeros(classes, self.traps, 1, height, width)
        patterns = torch.zeros(classes, self.traps, *shape)
        for mask, pattern in zip(masks.flatten(0, 1), patterns.flatten(0, 1), strict=True):
            for _ in range(self.squares):
                row, column = (
                    int(torch.randint(size - self.side + 1, (), generator=generator)) for size in (height, width)
                )
                place = (slice(None), slice(row, row + self.side), slice(column, column + self.side))
                mean, spread = torch.rand(2, shape[0], 1, 1, generator=generator)
                noise = torch.randn(pattern[place].shape, generator=generator)
                mask[place] = self.strength
                pattern[place] += (mean + spread * noise).clamp(0, 1)
        return masks, patterns.clamp(0, 1)

    def _planted(self, model: nn.Module, state: TrapdoorState, x: Tensor, y: Tensor, seed: int) -> nn.Module:
        """A copy of the model, trained on clean and on triggered inputs."""
        net = copy.deepcopy(model)
        asked = [(p, p.requires_grad) for p in net.parameters()]
        classes = len(state.masks)

        def loss(rows: Tensor, generator: torch.Generator) -> Tensor:
            lured = torch.rand(len(rows), generator=generator) < self.share
            k = torch.randint(classes, (len(rows),), generator=generator)
            which = torch.randint(self.traps, (len(rows),), generator=generator)
            at, lured, k, which = (t.to(x.device) for t in (rows, lured, k, which))
            inputs = torch.where(lured.view(-1, 1, 1, 1), state.triggered(x[at], k, which), x[at])
            return F.cross_entropy(classify(net, inputs), torch.where(lured, k, y[at]))

        with modes_kept(net), seeded(seed, "Trapdoor"):
            net.train().requires_grad_(True)
            descend(net.parameters(), loss, len(x), epochs=self.epochs, batch=BATCH, lr=self.lr, seed=seed)
        for p, before in asked:
            p.requires_grad_(before)
        return net

    def _sign(self, net: nn.Module, state: TrapdoorState, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        """The signature of each trapdoor, and which neurons are compared; a net that did not learn its trapdoors is refused."""
        signatures, lured, asked = [], 0, 0
        for k in range(len(state.masks)):
            others = x[y != k][:SIGNED]
            if not len(others):
                raise DataError(
                    f"All inputs to learn from are of class {k}: nothing shows what its trapdoor does to others."
                )
            for which in range(self.traps):
                parts = []
                for part in others.split(256):
                    with torch.no_grad():
                        at = torch.full((len(part),), k, device=x.device)
                        logits, (seen,) = activations(
                            net, [state.name], state.triggered(part, at, torch.full_like(at, which))
                        )
                    parts.append(seen)
                    lured, asked = lured + int((logits.argmax(1) == k).sum()), asked + len(part)
                signatures.append(torch.cat(parts).mean(0))
        if lured < LEARNT * asked:
            raise ModelError(
                f"After {self.epochs} epochs {lured / asked:.0%} of the triggered inputs lead to their trapdoor's class; at least "
                f"{LEARNT:.0%} must. Give more epochs or examples, a larger strength, side or number of squares, or fewer trapdoors."
            )
        whole = torch.stack(signatures)
        kept = torch.randperm(whole.shape[1], generator=generator)[: max(1, round(self.neurons * whole.shape[1]))]
        state.neurons = torch.zeros_like(whole[0]).index_fill(0, kept.to(x.device), 1.0)
        state.signatures = (whole * state.neurons).unflatten(0, (len(state.masks), self.traps))

    def _limits(self, net: nn.Module, state: TrapdoorState, x: Tensor) -> Tensor:
        """Of each class, from the similarities of the clean inputs to which the net gives that answer, [K]."""
        with torch.no_grad():
            logits, alike = (
                torch.cat(parts)
                for parts in zip(*(self._alike(net, state, part) for part in x.split(256)), strict=True)
            )
        answer, held = logits.argmax(1), "among the third of all examples held out"
        return torch.stack(
            [
                calibrated(alike[answer == k, k], self.fpr, f"Trapdoor, for the answer {k} and {held},")
                for k in range(alike.shape[1])
            ]
        )

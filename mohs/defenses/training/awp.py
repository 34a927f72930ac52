"""AWP: any objective at the weights near by where it is worst."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mohs.defenses._settings import number
from mohs.defenses.training.objective import Context, Last, Objective, check_inner
from mohs.defenses.training.turn import Turn

if TYPE_CHECKING:
    from mohs.attacks import Attack

TINY = 1e-20


@dataclass(frozen=True)
class AWP:
    """Adversarial weight perturbation: minimise an objective at weights that were moved to make it worse.

        v_l = gamma * ||w_l|| / ||g_l|| * g_l        g = gradient of the objective at w, for each weight tensor l
        w = w - lr * (gradient of the objective at w + v)

    Robust accuracy on test examples falls in the later part of adversarial training while that on training examples goes on
    rising (robust overfitting). Flat minima overfit less; this makes them so, with any objective. With ``gamma`` too
    large the net stays at chance: lower it, or begin without.

    Args:
        objective: such as ``Saddle(attack)`` or ``TRADES()``; the same adversarial points serve both gradients.
        gamma: size of the perturbation as a share of each weight tensor's norm, >= 0. The paper's is 0.01 for the saddle point
            and 0.005 for TRADES.

    Cost: that of the objective, and its forwards and backwards at the given points once more; memory of the weights once more.

    **Differs from the paper**: the weights are put back from a copy before the update, where the published code subtracts v
    after it, which rounds and lets the weight decay act at w + v; no warm-up. As there, only tensors with more than one
    dimension move: no biases, no batch norm. The first look leaves no trace in batch statistics.
    **Source**: D. Wu, S.-T. Xia, Y. Wang, "Adversarial weight perturbation helps robust generalization", NeurIPS 2020,
    section 4 and algorithm 1, with one step of ascent on the weights per batch.
    """

    objective: Objective
    gamma: float = 0.01

    def __post_init__(self) -> None:
        check_inner("AWP", self.objective)
        number(self.gamma, "gamma of AWP, a share of the norm of weights,", 0)

    @property
    def attack(self) -> Attack | None:
        """The objective's."""
        return self.objective.attack

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """The objective's loss at the present weights."""
        return self.objective.loss(model, x, y, context)

    def step(self, turn: Turn) -> float:
        """The gradient at w + v, the update at w; answers the loss at w + v."""
        held = _Held()

        def loss(model: nn.Module, x: Tensor, y: Tensor, context: Context) -> Tensor:
            return self.objective.loss(model, x, y, held.inside(context))

        weights = [p for p in turn.parameters if p.dim() > 1]
        with _kept(list(turn.model.buffers())):
            turn.gradients(loss)
        with _kept(weights):
            for w in weights:
                if w.grad is not None:
                    w.data.add_(w.grad, alpha=self.gamma * float(w.data.norm() / (w.grad.norm() + TINY)))
            value = turn.gradients(loss)
        turn.update()
        return value


class _Held:
    """The points of a batch: made at the first look at it, and the same again at every later one."""

    def __init__(self) -> None:
        self.points: list[Tensor] = []

    def inside(self, context: Context) -> Context:
        """The context for one more look."""
        looked = itertools.count()

        def once(make: Callable[[], Tensor]) -> Tensor:
            k = next(looked)
            if k == len(self.points):
                self.points.append(context.once(make))
            return self.points[k]

        def perturb(
            attack: Attack | Last, x: Tensor, y: Tensor, *, of: nn.Module | None = None, radii: Tensor | None = None
        ) -> Tensor:
            return once(lambda: context.perturb(attack, x, y, of=of, radii=radii))

        return replace(context, perturb=perturb, once=once)


@contextmanager
def _kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Afterwards the tensors are what they were, bit by bit."""
    before = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)

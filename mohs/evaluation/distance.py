"""How far is the decision boundary: several minimum-norm attacks under one budget, the best of them per example."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mohs.attacks import DDN, FAB, FMN, PDPGD, Attack, DeepFool, SigmaZero, attack
from mohs.errors import ThreatError, UsageError
from mohs.threat import Threat

Leg = tuple[Callable[[int], Attack], float, int, int]
"""An attack by its number of steps, its share of the budget, the passes of a step, and those beyond its steps: FAB and
DeepFool linearise several classes, at first more of them."""

ENSEMBLE: dict[str, tuple[Leg, ...]] = {
    "linf": ((PDPGD, 0.6, 2, 1), (FMN, 0.2, 2, 1), (FAB, 0.2, 4, 8)),
    "l2": ((DDN, 0.6, 2, 1), (FMN, 0.2, 2, 1), (FAB, 0.2, 4, 8)),
    "l1": ((PDPGD, 0.8, 2, 1), (FAB, 0.2, 4, 8)),
    "l0": ((SigmaZero, 1.0, 2, 1),),
    "lp": ((DeepFool, 0.4, 5, 8), (FAB, 0.6, 4, 8)),
}
"""Which attacks run in which region, one after the other, each from the best point so far: first one that crosses valleys,
then one that follows the boundary, last one that is exact where the boundary is straight."""


@dataclass(frozen=True)
class Distances:
    """The smallest changes found, per example: upper bounds on the distance to the decision boundary.

    ``x`` [N, ...] the examples, ``size`` [N] the norm of the change (inf: none found), ``by`` the name of the attack that
    found each ('' for none), ``forwards`` and ``backwards`` [N] what all of them spent.
    """

    x: Tensor
    size: Tensor
    by: list[str]
    forwards: Tensor
    backwards: Tensor

    @property
    def success(self) -> Tensor:
        """Was any change found, [N] bool?"""
        return self.size.isfinite()

    @property
    def median(self) -> float:
        """Median size; an example without a change counts as infinitely far. NaN without examples."""
        return float(self.size.median()) if len(self.size) else float("nan")

    def accuracy(self, eps: float | Tensor) -> Tensor:
        """Share of examples whose smallest change is larger than ``eps`` (a number or [M]): an upper bound on accuracy there.

        >>> found = Distances(torch.zeros(3, 1), torch.tensor([0.0, 0.1, 0.3]), ["", "", ""], torch.zeros(3), torch.zeros(3))
        >>> found.accuracy(torch.tensor([0.05, 0.2, 0.4])).tolist()
        [0.6666666865348816, 0.3333333432674408, 0.0]
        """
        radii = torch.as_tensor(eps, dtype=self.size.dtype, device=self.size.device)
        return (self.size > radii.unsqueeze(-1)).float().mean(-1)

    def curve(self) -> tuple[Tensor, Tensor]:
        """The whole accuracy-against-radius curve: radii [M] at which it falls, and the accuracy from each of them on [M]."""
        radii = self.size[self.success].unique()
        return radii, self.accuracy(radii)


def minimum_norm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat | str,
    *,
    passes: int = 400,
    targets: Tensor | None = None,
    seed: int = 0,
    batch: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Distances:
    """Find the smallest change of each example that changes the answer, with several attacks under one budget.

    The attacks of the region run one after the other, each from the best point found so far, and share the passes.

    Args:
        model: inputs in the box to logits; in eval mode.
        x: clean inputs [N, ...].
        y: true classes [N]; an example that is wrong from the start has size 0.
        threat: region and box; the radius must be infinite, such as ``"l2:inf"`` (or just ``"l2"``).
        passes: forwards plus backwards per example at most, all attacks together.
        targets: classes to reach instead [N].
        seed: of the random streams.
        batch: physical batch size.
        progress: called with (attack, examples finished, of how many).

    Raises:
        ThreatError: a finite radius.
        UsageError: too few passes for a step of each attack.

    >>> net = torch.nn.Linear(2, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> found = minimum_norm(net, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), "l2:inf", passes=200)
    >>> round(float(found.size), 3)  # exactly 0.2 / sqrt(2) = 0.1414
    0.141
    """
    if isinstance(threat, str) and ":" not in threat:
        norm, space, box = threat.partition(" ")
        threat = f"{norm}:inf{space}{box}"
    threat = Threat.parse(threat)
    if not threat.minimum:
        raise ThreatError(
            f"minimum_norm looks for the smallest change; got {threat}. Give an infinite radius, such as "
            f"'{threat.region.name}:inf', or use mohs.attack at a radius."
        )
    relay = ENSEMBLE[threat.region.kind]
    least = max(math.ceil((cost + beyond) / share) for _, share, cost, beyond in relay)
    if type(passes) is not int or passes < least:
        raise UsageError(f"passes must be a whole number >= {least} for {threat.region.name}; got {passes!r}.")
    best, size = x.detach().clone(), x.new_full((len(x),), torch.inf)
    by, spent = [""] * len(x), y.new_zeros((2, len(x)))
    for leg, (make, share, cost, beyond) in enumerate(relay):
        one = make(int((share * passes - beyond) / cost))
        name = type(one).__name__

        def tell(done: int, _: int, name: str = name) -> None:
            if progress is not None:
                progress(name, done, len(x))

        found = attack(
            one, model, x, y, threat, targets=targets, seed=seed, batch=batch, progress=tell,
            start=best if leg else None,
        )  # fmt: skip
        closer = found.size < size
        best[closer], size[closer] = found.x[closer], found.size[closer]
        by = [name if c else b for c, b in zip(closer.tolist(), by)]
        spent[0] += found.forwards
        spent[1] += found.backwards
    return Distances(best, size, by, spent[0], spent[1])

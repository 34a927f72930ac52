"""How far is the decision boundary: several minimum-norm attacks under one budget, the best of them per example."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mohs.attacks import DDN, FAB, FMN, PDGD, PDPGD, Attack, SigmaZero, SuperDeepFool, TrustRegion, attack
from mohs.errors import ThreatError, UsageError
from mohs.threat import Threat


@dataclass(frozen=True)
class Leg:
    """One attack of the relay: ``make`` builds it from its number of steps. It gets ``share`` of the passes that are left
    when its turn comes, and ``sure`` steps in any case if there are passes for them; it is passed over where that is fewer
    than ``least``. A step costs at most ``cost`` passes, and all of them ``beyond`` more. ``warm``: it begins at the best
    point so far, else at the clean input."""

    make: Callable[[int], Attack]
    share: float = 1.0
    cost: int = 2
    beyond: int = 1
    sure: int = 0
    least: int = 1
    warm: bool = True

    def steps(self, left: int) -> int:
        """How many steps ``left`` passes allow; 0: not worth it."""
        shared, most = ((int(part) - self.beyond) // self.cost for part in (self.share * left, left))
        steps = min(max(shared, self.sure), most)
        return steps if steps >= self.least else 0

    def bill(self, steps: Tensor, spent: Tensor) -> Tensor:
        """What the budget is charged, [N]: the most that ``steps`` can cost, or half of it where that covers what was
        ``spent``. Exact bills would scatter the examples over many small runs of the next leg."""
        full = (steps * self.cost + self.beyond).masked_fill(steps == 0, 0)
        return torch.where(2 * spent <= full, (full + 1) // 2, full)


QUICK = Leg(SuperDeepFool, 0.25, beyond=11, sure=19)
"""At the boundary after a few steps and orthogonal to it after twenty; beyond its steps it measures ten classes."""
ACROSS = 40
"""Steps below which a leg that begins anew at the clean input is passed over: its weights or its trust are not balanced yet."""

ENSEMBLE: dict[str, tuple[Leg, ...]] = {
    "linf": (QUICK, Leg(TrustRegion, 0.7, beyond=11, least=ACROSS, warm=False), Leg(FMN)),
    "l2": (QUICK, Leg(PDGD, 0.7, least=ACROSS, warm=False), Leg(DDN)),
    "l1": (QUICK, Leg(PDPGD, 0.7, least=ACROSS, warm=False), Leg(FMN)),
    "l0": (Leg(SigmaZero),),
    "lp": (QUICK, Leg(FAB, cost=4, beyond=8)),
}
"""Which attacks run in which region, one after the other: first a quick one, then one that starts anew and gets elsewhere,
last one that follows the boundary from the best point so far."""


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

    The attacks of the region run one after the other and share the passes: a quick one first, then one that searches anew, last
    one that goes on from the best point. What an attack does not need, another gets in part.

    Args:
        model: inputs in the box to logits; in eval mode.
        x: clean inputs [N, ...].
        y: true classes [N]; an example that is wrong from the start has size 0.
        threat: region and box; the radius must be infinite, such as ``"l2:inf"`` (or just ``"l2"``).
        passes: forwards plus backwards per example at most, all attacks together (the fresh looks that judge a point of a
            random model come on top).
        targets: classes to reach instead [N].
        seed: of the random streams.
        batch: physical batch size.
        progress: called with (attack, examples finished, of how many).

    Raises:
        ThreatError: a finite radius, patches or words.
        UsageError: too few passes for a step of any attack.

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
    if threat.region.kind not in ENSEMBLE:
        raise ThreatError(
            f"minimum_norm serves {', '.join(ENSEMBLE)}; got {threat}. The sides of patches and counts of words are few numbers: "
            "attack with each, such as 'patch:3', from the smallest on."
        )
    relay = ENSEMBLE[threat.region.kind]
    least = next(n for n in itertools.count(1) if any(leg.steps(n) for leg in relay))
    if type(passes) is not int or passes < least:
        raise UsageError(f"passes must be a whole number >= {least} for {threat.region.name}; got {passes!r}.")
    best, size = x.detach().clone(), x.new_full((len(x),), torch.inf)
    by, spent = [""] * len(x), y.new_zeros((2, len(x)))
    left = torch.full_like(spent[0], passes)
    for leg in relay:
        before = spent.sum(0)
        steps = torch.tensor(
            [leg.steps(n) for n in left.masked_fill(size == 0, 0).tolist()], dtype=y.dtype, device=y.device
        )
        finished = int((steps == 0).sum())
        for count in steps[steps > 0].unique().tolist():
            rows = (steps == count).nonzero().squeeze(1)
            one = leg.make(count)
            name = type(one).__name__

            def tell(done: int, _: int, name: str = name, finished: int = finished) -> None:
                if progress is not None:
                    progress(name, finished + done, len(x))

            found = attack(
                one, model, x[rows], y[rows], threat, targets=None if targets is None else targets[rows], seed=seed,
                batch=batch, progress=tell, start=best[rows] if leg.warm else None,
            )  # fmt: skip
            finished += len(rows)
            closer = found.size < size[rows]
            won = rows[closer]
            best[won], size[won] = found.x[closer], found.size[closer]
            for row in won.tolist():
                by[row] = name
            spent[0, rows] += found.forwards
            spent[1, rows] += found.backwards
        left -= leg.bill(steps, spent.sum(0) - before)
    return Distances(best, size, by, spent[0], spent[1])

"""Two numbers for the robustness of a model as a whole: the mean relative change, and the radius that breaks most."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mohs import streams
from mohs.attacks import FGSM, Attack, attack
from mohs.attacks._inputs import check_inputs, check_mode
from mohs.errors import DataError, UsageError, rows_text
from mohs.evaluation._quiet import untouched
from mohs.problem import Findings, Goal, Problem
from mohs.regions import Lp
from mohs.target import Target, classify
from mohs.threat import Threat

_FINEST, _WIDEST = -40, 40
"""Radii are sought between 2 to these powers, in units of the scan's start."""


class Radius(NamedTuple):
    """A radius and the share of the inputs it breaks."""

    eps: float
    share: float


def relative_sizes(
    method: Attack,
    model: nn.Module,
    x: Tensor,
    *,
    norm: str = "l2",
    batch: int | None = None,
    seed: int = 0,
    restarts: int = 1,
) -> Tensor:
    """||r||_p / ||x||_p per input, [N], of the smallest change found that leaves the model's own label.

    It is inf where none was found. There is no box, and an overshoot is part of the change. Arguments, errors and
    cost as for ``rho_adv``.
    """
    threat = Threat(Threat.parse(f"{norm}:inf").region, box=(-math.inf, math.inf))
    if not isinstance(threat.region, Lp):
        raise UsageError(f"A relative size needs a norm; got {norm!r}. Allowed: 'l1', 'l2', 'linf' and other p >= 1.")
    check_inputs(x, torch.zeros(len(x), dtype=torch.int64, device=x.device), threat, batch=batch)
    check_mode(model)
    length = threat.region.measure(x, torch.zeros_like(x))
    empty = (length == 0).nonzero().flatten().tolist()
    if empty:
        raise DataError(
            f"A relative size needs inputs that are not all zero; got zeros in {rows_text(empty)}. Drop these examples."
        )
    with untouched(model, seed):
        label = _own_labels(model, x, batch or min(256, max(len(x), 1)))
    out = attack(method, model, x, label, threat, restarts=restarts, seed=seed, batch=batch)
    return out.size / length


def rho_adv(
    method: Attack,
    model: nn.Module,
    x: Tensor,
    *,
    norm: str = "l2",
    batch: int | None = None,
    seed: int = 0,
    restarts: int = 1,
) -> float:
    """The mean over all inputs of ||r||_p / ||x||_p, where r is the smallest change an attack found: small is fragile.

    Needs no labels: what counts is leaving the model's own answer. It is an upper bound on the true mean, as the attack
    need not find the smallest change. An input that was not broken has size inf, and then so is the mean: to leave it
    out would make an attack that fails look like a model that is fragile. A warning names those rows;
    ``relative_sizes`` has the values one by one for other summaries, such as the median.

    Args:
        method: a minimum-norm attack, such as ``mohs.attacks.DeepFool()``.
        model: a classifier in eval mode.
        x: inputs [N, ...], N >= 1, none of them all zero. There is no box.
        norm: p above and below the line: 'l2', 'linf', 'l1', 'l1.5', ...
        batch: physical batch size, as for ``mohs.attack``.
        seed, restarts: as for ``mohs.attack``.

    Returns:
        The mean; inf if any input was not broken.

    Raises:
        DataError: no inputs, or inputs that are all zero (rows are named).
        ModelError, UsageError, AccessError: as ``mohs.attack``.

    Cost: one forward per input, and what the attack costs.

    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
    >>> from mohs.attacks import DeepFool
    >>> rho = rho_adv(DeepFool(overshoot=0.02), net, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    >>> round(rho, 4)  # (0.6 + 0.8) / 2, and the overshoot
    0.714

    **Differs from the paper**: failures are counted as inf; norms other than 2 as well.
    **Source**: S. Moosavi-Dezfooli, A. Fawzi, P. Frossard, "DeepFool: a simple and accurate method to fool deep neural
    networks", CVPR 2016, equation 2 (the definition) and section 4.
    """
    if not len(x):
        raise DataError("A mean needs at least one input; got none.")
    sizes = relative_sizes(method, model, x, norm=norm, batch=batch, seed=seed, restarts=restarts)
    failed = sizes.isinf().nonzero().flatten().tolist()
    if failed:
        warnings.warn(
            f"{method!r} found no change for {len(failed)} of {len(x)} inputs ({rows_text(failed)}), so the mean is "
            "inf. Give it more steps, or take another summary of relative_sizes().",
            RuntimeWarning, stacklevel=2,
        )  # fmt: skip
    return float(sizes.double().mean())


def smallest_radius(
    model: nn.Module,
    x: Tensor,
    *,
    share: float = 0.9,
    y: Tensor | None = None,
    norm: str = "linf",
    box: tuple[float, float] = (0.0, 1.0),
    method: FGSM | None = None,
    tolerance: float = 0.01,
    batch: int | None = None,
    seed: int = 0,
) -> Radius:
    """The smallest radius at which FGSM breaks a share of the inputs; one gradient per input, then forwards only.

    One step does not break monotonically: an input broken at some radius may be right again at a larger one. So a
    radius counts by what FGSM does at that very radius, and 'smallest' is meant on a scan: radii double until the share
    is reached, and the last interval is bisected. At the answer the share is reached; within the tolerance below it is
    not, though an isolated smaller radius between two points of the scan may reach it.

    Args:
        model: a classifier in eval mode.
        x: inputs [N, ...], N >= 1, in the box.
        share: of the inputs to break, above 0 and at most 1.
        y: labels [N] to leave; None: the model's own answers.
        norm: 'linf', 'l2', 'l1', 'l1.5', ...; not l0 or patch, whose radius is no continuous number.
        box: of valid inputs; ``(-inf, inf)`` for none.
        method: whose objective to climb; None: ``FGSM()``.
        tolerance: relative width at which the bisection ends.
        batch: physical batch size.
        seed: of the generators that a random model draws from.

    Returns:
        (eps, share): the radius and the share it breaks. eps is 0 if the clean inputs suffice (with ``y``), and inf,
        with the largest share seen, if no radius does.

    Raises:
        DataError, ModelError, ThreatError, UsageError: see the message.

    Cost: per input 1 forward and 1 backward, and 1 forward per radius: about 20 with the defaults.

    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, -1.0]]))
    >>> eps, broken = smallest_radius(net, torch.tensor([[0.6, 0.4], [0.2, 0.6]]), share=1.0, tolerance=1e-4)
    >>> round(eps, 3), broken  # |0.2 - 0.6| / (1 + 1)
    (0.2, 1.0)

    **Differs from the paper**: the definition of smallest and the way it is sought are not from there.
    **Source**: S. Moosavi-Dezfooli, A. Fawzi, P. Frossard, CVPR 2016, section 4 (how the radius of the fast gradient
    sign method is set for the comparison, share 0.9).
    """
    method = FGSM() if method is None else method
    if not isinstance(method, FGSM):
        raise UsageError(f"smallest_radius follows one gradient, so its method must be an FGSM; got {method!r}.")
    for name, value in (("share", share), ("tolerance", tolerance)):
        if not 0 < value <= 1:
            raise UsageError(f"{name} must be above 0 and at most 1; got {value!r}.")
    threat = Threat(Threat.parse(f"{norm}:inf").region, box=box)
    if not isinstance(threat.region, Lp):
        raise UsageError(
            f"A radius to bisect needs a norm; got {norm!r}. Allowed: 'l1', 'l2', 'linf' and other p >= 1."
        )
    labels = torch.zeros(len(x), dtype=torch.int64, device=x.device) if y is None else y
    check_inputs(x, labels, threat, batch=batch)
    check_mode(model)
    if not len(x):
        raise DataError("A share needs at least one input; got none.")
    physical = batch or min(256, len(x))
    with untouched(model, seed):
        labels = _own_labels(model, x, physical) if y is None else y
        line = _Line.of(Target(model), threat, x, labels, physical, method)
        return _search(line, _first_radius(threat, x), share, tolerance)


def _search(line: _Line, start: float, share: float, tolerance: float) -> Radius:
    at_zero = line.broken(0.0)
    if at_zero >= share:
        return Radius(0.0, at_zero)
    found, most = line.broken(start), at_zero
    eps = start
    if found >= share:
        low = eps / 2
        while (smaller := line.broken(low)) >= share and low > start * 2.0**_FINEST:
            eps, found, low = low, smaller, low / 2
    else:
        while found < share:
            most = max(most, found)
            if line.exhausted(eps) or eps > start * 2.0**_WIDEST:
                return Radius(math.inf, most)
            eps *= 2
            found = line.broken(eps)
        low = eps / 2
    while eps - low > tolerance * eps:
        middle = (low + eps) / 2
        reached = line.broken(middle)
        if reached >= share:
            eps, found = middle, reached
        else:
            low = middle
    return Radius(eps, found)


@dataclass
class _Line:
    """FGSM's one direction per input, and the share it breaks at a radius."""

    parts: list[tuple[Problem, Tensor, int]]
    count: int
    reach: float

    @classmethod
    def of(cls, target: Target, threat: Threat, x: Tensor, y: Tensor, batch: int, method: FGSM) -> _Line:
        """One forward and one backward per input."""
        parts = []
        for rows in torch.arange(len(x), device=x.device).split(batch):
            index = rows[torch.arange(batch, device=x.device).clamp_max(len(rows) - 1)]
            x0 = x[index].detach()
            zero = torch.zeros_like(index)
            problem = Problem(
                target, threat, x0, x0.new_zeros(batch), Goal.leave(y[index]), streams.content_keys(x0), index, zero, zero,
                Findings.none(x0),
            )  # fmt: skip
            problem.found.settled[len(rows) :] = True  # padding
            parts.append((problem, problem.gradient(x0, method.objective), len(rows)))
        lo, hi = threat.box
        corner = x.new_full((1, *x.shape[1:]), hi - lo)
        return cls(parts, len(x), float(threat.region.measure(corner, torch.zeros_like(corner))))

    def broken(self, eps: float) -> float:
        """The share that one step of this length breaks: one forward per input."""
        won = 0
        for problem, gradient, rows in self.parts:
            region, box = problem.threat.region, problem.threat.box
            at = replace(problem, eps=torch.full_like(problem.eps, eps))
            won += int(at.look(region.extreme(gradient, at.x0, at.eps, box)).met[:rows].sum())
        return won / self.count

    def exhausted(self, eps: float) -> bool:
        """Is the ball larger than the box, so that a larger radius changes nothing?"""
        return eps >= self.reach


def _first_radius(threat: Threat, x: Tensor) -> float:
    """A hundredth of the size of a typical input, or of the box: where the scan starts."""
    lo, hi = threat.box
    size = hi - lo if math.isfinite(hi - lo) else float(x.abs().max()) or 1.0
    whole = torch.full_like(x[:1], size)
    return 0.01 * float(threat.region.measure(whole, torch.zeros_like(whole)))


def _own_labels(model: nn.Module, x: Tensor, batch: int) -> Tensor:
    """The model's answers, [N], in physical batches."""
    labels = []
    for part in x.detach().split(batch):
        index = torch.arange(batch, device=x.device).clamp_max(len(part) - 1)
        with torch.no_grad():
            labels.append(classify(model, part[index]).argmax(1)[: len(part)])
    return torch.cat(labels).clone() if labels else torch.zeros(0, dtype=torch.int64, device=x.device)

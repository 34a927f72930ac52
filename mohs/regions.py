"""Geometry of the allowed change: balls around the clean input, intersected with the box of valid inputs.

A region knows how to start, step, project and measure; every attack asks it, so one PGD serves all of them. ``Linf(0.1)``
is the form of a threat; the methods take the radius of each row, ``eps`` [B], and the box ``(lo, hi)``.
All methods map rows to rows and are positively homogeneous in gradients: tiny gradients step as far as large ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mohs import streams
from mohs._geometry import Box, largest, per_row, unit_scale
from mohs._patch import Patch
from mohs._words import Words
from mohs.errors import ThreatError


def _power(v: Tensor, exponent: float) -> Tensor:
    """v ** exponent for v >= 0, the same bits wherever in the tensor a number stands.

    ``Tensor.pow`` differs in the last place between its vector loop and the scalar tail of each thread's chunk, so a row's
    result would depend on its place in the batch; log and exp have no such tail, and float64 hides what is left.
    """
    if exponent in (0.5, 1.0, 2.0, 3.0):
        return v.pow(exponent)
    return v.double().log_().mul_(exponent).exp_().to(v.dtype)


@dataclass(frozen=True)
class Lp:
    """All changes of p-norm at most ``eps``, for 1 < p < inf; parent of the named balls.

    Args:
        p: the norm, above 1 (use ``L1``, ``L2``, ``Linf`` for those).
        eps: radius in input units; ``math.inf`` asks for the smallest change.

    The projection of a general p is radial (feasible, not nearest); L1 and Linf are exact.
    """

    p: float
    eps: float

    def __post_init__(self) -> None:
        if not (isinstance(self.eps, int | float) and self.eps >= 0):
            raise ThreatError(
                f"{type(self).__name__} needs a radius; got eps={self.eps!r}. Give a number >= 0 in input units, "
                "such as 8/255, or inf for the smallest change."
            )
        if type(self) is Lp and not (1 < self.p < math.inf and self.p != 2):
            raise ThreatError(f"Lp needs 1 < p < inf, p != 2; got p={self.p!r}. Use L1, L2 or Linf for those norms.")

    @property
    def kind(self) -> str:
        """The family an attack names when it says which regions it serves: linf, l2, l1, lp, l0, patch or words."""
        return self.name if type(self) is not Lp else "lp"

    @property
    def name(self) -> str:
        """The short form's first word, such as ``linf``."""
        return f"l{self.p:g}" if float(f"{self.p:g}") == self.p else f"l{self.p!r}"

    def measure(self, x: Tensor, x0: Tensor) -> Tensor:
        """Size of the change, [B], in the region's own unit."""
        return torch.linalg.vector_norm((x - x0).flatten(1), self.p, dim=1)

    def contains(self, x: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        """[B] bool: is the change allowed? Tolerates the rounding of x0 + change and of the norm, 1e-5 relative."""
        size, limit = self.measure(x, x0), eps * (1 + 1e-5)
        inside = size <= limit
        if bool(inside.all()):
            return inside
        # x0 + change is rounded coordinate by coordinate: at most one unit in the last place of the result each
        rounding = (largest(x0) + eps) * torch.finfo(x0.dtype).eps
        return size <= limit + rounding * x0[0].numel() ** (1 / self.p)

    def dual(self, w: Tensor) -> Tensor:
        """Dual norm of a gradient, [B]: the best first-order gain of a change of unit norm."""
        q = self._dual_exponent
        scale = largest(w).clamp_min_(torch.finfo(w.dtype).tiny)
        return scale * torch.linalg.vector_norm((w / per_row(scale, w)).flatten(1), q, dim=1)

    @property
    def _dual_exponent(self) -> float:
        if self.p == 1:
            return math.inf
        return 1.0 if math.isinf(self.p) else self.p / (self.p - 1)

    def steepest(self, g: Tensor) -> Tensor:
        """The change of unit norm that gains most along ``g``: |g|^(q-1) sign(g) over its norm; zero for zero."""
        q = self._dual_exponent
        unit = unit_scale(g)
        direction = unit.sign() * _power(unit.abs(), q - 1)
        norm = torch.linalg.vector_norm(direction.flatten(1), self.p, dim=1)
        return direction / per_row(norm.clamp_min_(torch.finfo(g.dtype).tiny), g)

    def extreme(self, g: Tensor, x0: Tensor, eps: Tensor, box: Box) -> Tensor:
        """The point of the ball that gains most along ``g``, clipped to the box (FGSM's step)."""
        return self.project(x0 + per_row(eps, g) * self.steepest(g), x0, eps, box)

    def shortest(self, w: Tensor, gain: Tensor, x: Tensor, box: Box) -> Tensor:
        """The smallest change r with <w, r> = gain [B] and x + r in the box; to the box's corner where none gains that much.

        It is the steepest direction, t times, each coordinate stopped at its bound. The gain is concave and piecewise linear
        in t, so Newton's iteration comes from below, stops more coordinates each time, and is exact once none is added: usually
        a handful of passes over the row, where a sort of the kinks would cost several times as much. Zero for a zero gradient.
        """
        shape, direction = w.shape, self.steepest(w).flatten(1)
        w, x = w.flatten(1), x.flatten(1)
        room = torch.where(w > 0, box[1] - x, x - box[0]).clamp_min_(0.0)
        rate, most = w * direction, (w.abs() * room).masked_fill_(w == 0, 0.0)  # the latter is inf * 0 without a box
        slope = rate.sum(1)
        most_t = torch.finfo(x.dtype).max  # inf times the zero of a coordinate without gradient would be nan
        t = torch.where(slope > 0, gain / slope, 0.0).clamp_max_(most_t)
        while True:
            gained = rate * t.unsqueeze(1)
            left = (rate * (gained < most)).sum(1)
            fewer = left < slope
            if not bool(fewer.any()):
                break
            missing = gain - torch.minimum(gained, most, out=gained).sum(1)
            further = torch.where(left > 0, t + missing / left, most_t).clamp_max_(most_t)
            t = torch.where(fewer, torch.maximum(further, t), t)  # a row that has ended waits for its batch mates
            slope = torch.minimum(left, slope)
        return torch.minimum(direction.abs().mul_(t.unsqueeze(1)), room).mul_(direction.sign()).view(shape)

    def move(self, x: Tensor, g: Tensor, size: Tensor, x0: Tensor, box: Box) -> Tensor:
        """One ascent step of length ``size`` [B] from ``x`` along ``g``, before projection."""
        return self.steepest(g).mul_(per_row(size, x)).add_(x)

    def advance(self, x: Tensor, g: Tensor, size: Tensor, x0: Tensor, eps: Tensor, box: Box) -> Tensor:
        """``move``, then ``project``."""
        return self.project(self.move(x, g, size, x0, box), x0, eps, box)

    def project(self, x: Tensor, x0: Tensor, eps: Tensor, box: Box) -> Tensor:
        """A point of ball and box: clip to the box, then shrink the change (exactly feasible for x0 in the box)."""
        change = x.clamp(*box).sub_(x0)
        norm = torch.linalg.vector_norm(change.flatten(1), self.p, dim=1)
        shrink = (eps / norm.clamp_min(torch.finfo(x.dtype).tiny)).clamp_(max=1.0)
        return change.mul_(per_row(shrink, x)).add_(x0).clamp_(*box)

    def start(self, x0: Tensor, eps: Tensor, box: Box, key: Tensor) -> Tensor:
        """A random point of ball and box from the row's stream (uniform in the ball where that has a simple form)."""
        direction = streams.normal(key, tuple(x0.shape[1:]), dtype=x0.dtype)
        return self.project(x0 + self._inside(direction, eps, key), x0, eps, box)

    def _inside(self, direction: Tensor, eps: Tensor, key: Tensor) -> Tensor:
        """Scale directions so that their norm is that of a uniform point of the ball."""
        norm = torch.linalg.vector_norm(direction.flatten(1), self.p, dim=1).clamp_min_(1e-12)
        u = streams.uniform(key, (1,), draw=1, dtype=direction.dtype).squeeze(1)
        return direction * per_row(eps * _power(u, 1.0 / direction[0].numel()) / norm, direction)

    def default_step(self, eps: Tensor, steps: int, box: Box) -> Tensor:
        """2.5 * eps / steps: far enough to cross the ball and come back (Madry et al.)."""
        return 2.5 * eps / max(steps, 1)


@dataclass(frozen=True)
class L2(Lp):
    """All changes of Euclidean norm at most ``eps``.

    The projection clips to the box and then shrinks the change: feasible, and a few percent farther than the nearest point.
    """

    p: float = field(default=2.0, init=False, repr=False)

    def steepest(self, g: Tensor) -> Tensor:
        """g over its norm."""
        unit = unit_scale(g)
        norm = torch.linalg.vector_norm(unit.flatten(1), dim=1).clamp_min_(torch.finfo(g.dtype).tiny)
        return unit.div_(per_row(norm, g))


@dataclass(frozen=True)
class Linf(Lp):
    """All changes of at most ``eps`` per coordinate."""

    p: float = field(default=math.inf, init=False, repr=False)

    def steepest(self, g: Tensor) -> Tensor:
        """The sign of g."""
        return g.sign()

    def measure(self, x: Tensor, x0: Tensor) -> Tensor:
        """Largest change of a coordinate, [B]."""
        return (x - x0).abs_().flatten(1).amax(1)

    def project(self, x: Tensor, x0: Tensor, eps: Tensor, box: Box) -> Tensor:
        """The nearest point of ball and box: clip the change, then the point."""
        return self._clip(x - x0, x0, eps, box)

    def advance(self, x: Tensor, g: Tensor, size: Tensor, x0: Tensor, eps: Tensor, box: Box) -> Tensor:
        """``move``, then ``project``, in one buffer: fresh memory costs more than the arithmetic on it."""
        return self._clip(g.sign().mul_(per_row(size, x)).add_(x).sub_(x0), x0, eps, box)

    @staticmethod
    def _clip(change: Tensor, x0: Tensor, eps: Tensor, box: Box) -> Tensor:
        radius = per_row(eps, x0)
        torch.minimum(change, radius, out=change)  # clamp with broadcast bounds is several times slower
        return torch.maximum(change, -radius, out=change).add_(x0).clamp_(*box)

    def start(self, x0: Tensor, eps: Tensor, box: Box, key: Tensor) -> Tensor:
        """Uniform in the cube, clipped to the box (Madry et al.)."""
        u = streams.uniform(key, tuple(x0.shape[1:]), dtype=x0.dtype).mul_(2).sub_(1)
        return u.mul_(per_row(eps, x0)).add_(x0).clamp_(*box)


@dataclass(frozen=True)
class L1(Lp):
    """All changes whose coordinates sum to at most ``eps`` in magnitude."""

    p: float = field(default=1.0, init=False, repr=False)
    share: ClassVar[float] = 0.01  # SLIDE moves the top 1% of the coordinates

    def steepest(self, g: Tensor) -> Tensor:
        """The whole step on the coordinate of largest magnitude (the first one on ties)."""
        flat = g.flatten(1)
        best = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter_(1, best, flat.gather(1, best).sign()).view_as(g)

    def shortest(self, w: Tensor, gain: Tensor, x: Tensor, box: Box) -> Tensor:
        """The smallest change r with <w, r> = gain and x + r in the box: coordinates in order of |w|, each to its bound."""
        shape, w, x = w.shape, w.flatten(1), x.flatten(1)
        room = torch.where(w > 0, box[1] - x, x - box[0]).masked_fill_(w == 0, 0.0).clamp_min_(0.0)
        strength, order = w.abs().sort(dim=1, descending=True, stable=True)
        room = room.gather(1, order)
        before = torch.nn.functional.pad((strength * room).cumsum(1), (1, -1))
        missing = (gain.unsqueeze(1) - before).clamp_min_(0.0)
        spend = torch.minimum(missing / strength.clamp_min(torch.finfo(w.dtype).tiny), room)
        return torch.zeros_like(w).scatter_(1, order, spend).mul_(w.sign()).view(shape)

    def extreme(self, g: Tensor, x0: Tensor, eps: Tensor, box: Box) -> Tensor:
        """Exact maximiser of <g, x> over ball and box: coordinates in order of |g|, each to its bound, until eps is spent."""
        flat, clean = g.flatten(1), x0.flatten(1)
        room = torch.where(flat > 0, box[1] - clean, clean - box[0]).masked_fill_(flat == 0, 0.0)
        order = flat.abs().argsort(dim=1, descending=True, stable=True)
        sorted_room = room.gather(1, order)
        # spent before each coordinate; not cumsum - room, which is inf - inf where the box has no bound
        before = torch.nn.functional.pad(sorted_room.cumsum(1)[:, :-1], (1, 0))
        spend = torch.minimum((eps.unsqueeze(1) - before).clamp_min_(0.0), sorted_room)
        change = torch.zeros_like(flat).scatter_(1, order, spend) * flat.sign()
        return (clean + change).view_as(x0).clamp_(*box)

    def move(self, x: Tensor, g: Tensor, size: Tensor, x0: Tensor, box: Box) -> Tensor:
        """A step shared by the 1% of coordinates of largest gradient that are not already at their bound.

        **Source**: F. Tramer, D. Boneh, "Adversarial training and robustness for multiple perturbations", NeurIPS 2019,
        section 3.1 (SLIDE).
        """
        flat, point = g.flatten(1), x.flatten(1)
        blocked = ((point >= box[1]) & (flat > 0)) | ((point <= box[0]) & (flat < 0))
        strength = flat.abs().masked_fill_(blocked, 0.0)
        count = max(1, round(self.share * flat.shape[1]))
        top, where = strength.topk(count, dim=1)
        # ties beyond the top are dropped; coordinates without gradient take no share of the step
        sign = flat.gather(1, where).sign() * (top > 0)
        step = sign * (size.unsqueeze(1) / sign.abs().sum(1, keepdim=True).clamp_min_(1.0))
        return point.scatter_add(1, where, step).view_as(x)

    def project(self, x: Tensor, x0: Tensor, eps: Tensor, box: Box) -> Tensor:
        """The nearest point of ball and box in L2, exactly.

        The optimal change is clip(soft(d, t), lo - x0, hi - x0) for one threshold t >= 0 per row. Its 1-norm is piecewise
        linear and falls with t, so Newton's method ends in the right piece; where it leaves the bracket it is halved instead.
        """
        d, clean = (x - x0).flatten(1), x0.flatten(1)
        size = d.abs()
        room = torch.where(d > 0, box[1] - clean, clean - box[0])
        kept = torch.minimum(size, room)
        radius = eps.unsqueeze(1)
        excess = kept.sum(1, keepdim=True) - radius
        if bool((excess > 0).any()):
            leave = size - room  # below this t the coordinate sits at its bound
            near = 8 * torch.finfo(x.dtype).eps * radius
            low, high = torch.zeros_like(excess), size.amax(1, keepdim=True)
            t, done = low, excess <= near
            for _ in range(64):  # ten are usual; as many halvings reach any threshold to rounding
                # coordinates that still shrink: beyond their bound and not yet at zero
                slope = ((leave <= t) & (size > t)).sum(1, keepdim=True)
                guess = t + excess / slope
                guess = torch.where((guess > low) & (guess < high), guess, (low + high) / 2)
                t = torch.where(done, t, guess)
                kept = torch.minimum((size - t).clamp_min_(0.0), room)
                excess = kept.sum(1, keepdim=True) - radius
                low, high = torch.where(excess > 0, t, low), torch.where(excess > 0, high, t)
                done |= (excess.abs() <= near) | (t >= high) & (t <= low)
                if bool(done.all()):
                    break
            # only rounding is left
            kept = kept * (radius / kept.sum(1, keepdim=True).clamp_min_(torch.finfo(x.dtype).tiny)).clamp_(max=1.0)
        return (clean + d.sign() * kept).view_as(x).clamp_(*box)

    def start(self, x0: Tensor, eps: Tensor, box: Box, key: Tensor) -> Tensor:
        """Uniform in the cross-polytope, projected onto the box."""
        u = streams.uniform(key, (2, *x0.shape[1:]), dtype=x0.dtype)
        laplace = u[:, 0].neg().log1p().neg_() * (u[:, 1] - 0.5).sign()
        return self.project(x0 + self._inside(laplace, eps, key), x0, eps, box)


@dataclass(frozen=True)
class L0:
    """Any change of at most ``eps`` positions; a position is a pixel with all its channels (``features=True``: one number).

    Args:
        eps: how many positions may change.
        features: count every number on its own.
    """

    eps: float
    features: bool = False

    def __post_init__(self) -> None:
        if not (self.eps >= 0 and (math.isinf(self.eps) or float(self.eps).is_integer())):
            raise ThreatError(f"L0 counts positions; got eps={self.eps!r}. Give a whole number >= 0, or inf.")

    kind: ClassVar[str] = "l0"

    @property
    def name(self) -> str:
        """``l0`` or ``l0-features``."""
        return "l0-features" if self.features else "l0"

    def positions(self, v: Tensor) -> Tensor:
        """[B, channels, positions]: what is counted together stands in dimension 1."""
        grouped = v.dim() == 4 and not self.features
        return v.flatten(2) if grouped else v.flatten(1).unsqueeze(1)

    def measure(self, x: Tensor, x0: Tensor) -> Tensor:
        """How many positions differ, [B]."""
        return self.positions(x != x0).any(1).sum(1).to(x0.dtype)

    def contains(self, x: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        """[B] bool: are few enough positions changed?"""
        return self.measure(x, x0) <= eps

    def steepest(self, g: Tensor) -> Tensor:
        """L0 is no norm: it has no direction of unit length and no dual."""
        raise ThreatError(
            "This attack follows a norm; got the threat l0. Allowed: l1, l2, linf and other p >= 1. Use PGD or a sparse attack for l0."
        )

    dual = steepest

    def shortest(self, w: Tensor, gain: Tensor, x: Tensor, box: Box) -> Tensor:
        """L0 is no norm; raises as ``steepest`` does."""
        return self.steepest(w)

    @staticmethod
    def top(score: Tensor, eps: Tensor) -> Tensor:
        """Which are the ``eps`` positions of highest score, [B, positions] bool; ties go to the first position."""
        count = eps.clamp(max=score.shape[1]).long().unsqueeze(1)
        most = max(int(count.amax()), 1) if len(count) else 1
        last = score.topk(most, dim=1).values.gather(1, (count - 1).clamp_min_(0))  # far cheaper than to sort them all
        above, tied = (score > last) & (count > 0), score == last
        return above | (tied & (tied.cumsum(1) <= count - above.sum(1, keepdim=True)))

    def _keep(self, x: Tensor, x0: Tensor, score: Tensor, eps: Tensor) -> Tensor:
        """Undo all changes but those at the ``eps`` positions of highest score; ties go to the first position."""
        keep = self.top(score, eps).unsqueeze(1)
        return torch.where(keep, self.positions(x), self.positions(x0)).view_as(x)

    def _finite(self, box: Box) -> None:
        if math.isinf(box[0]) or math.isinf(box[1]):
            raise ThreatError(f"L0 allows any value inside the box; got the box {box}. Give a finite one.")

    def extreme(self, g: Tensor, x0: Tensor, eps: Tensor, box: Box) -> Tensor:
        """Exact maximiser of <g, x>: the ``eps`` positions with the largest gain, each at its best bound."""
        self._finite(box)
        best = torch.where(g > 0, box[1], box[0]).to(x0.dtype)
        best = torch.where(g == 0, x0, best)
        gain = self.positions((best - x0) * unit_scale(g)).sum(1)
        return self._keep(best, x0, gain, eps)

    def move(self, x: Tensor, g: Tensor, size: Tensor, x0: Tensor, box: Box) -> Tensor:
        """A gradient step whose mean absolute change over all coordinates is ``size``.

        **Source**: F. Croce, M. Hein, "Sparse and imperceivable adversarial attacks", ICCV 2019, section 4 (PGD0).
        """
        unit = unit_scale(g)
        mean = unit.abs().flatten(1).mean(1)
        mean.masked_fill_(mean == 0, 1.0)  # no gradient, no step
        return x + unit * per_row(size / mean, x)

    def advance(self, x: Tensor, g: Tensor, size: Tensor, x0: Tensor, eps: Tensor, box: Box) -> Tensor:
        """``move``, then ``project``."""
        return self.project(self.move(x, g, size, x0, box), x0, eps, box)

    def project(self, x: Tensor, x0: Tensor, eps: Tensor, box: Box) -> Tensor:
        """The nearest point: keep the changes that would cost most to undo, given that they are clipped to the box."""
        clipped = x.clamp(*box)
        cost = self.positions((x - x0).square() - (x - clipped).square()).sum(1)
        return self._keep(clipped, x0, cost, eps)

    def start(self, x0: Tensor, eps: Tensor, box: Box, key: Tensor) -> Tensor:
        """Random values at ``eps`` random positions."""
        self._finite(box)
        values = streams.uniform(key, tuple(x0.shape[1:]), dtype=x0.dtype).mul_(box[1] - box[0]).add_(box[0])
        order = streams.uniform(key, (self.positions(x0).shape[2],), draw=1, dtype=torch.float64)
        return self._keep(values, x0, order, eps)

    def default_step(self, eps: Tensor, steps: int, box: Box) -> Tensor:
        """A mean move of 0.15 box widths, the published 30000/255 on 784 and 120000/255 on 3072 coordinates."""
        self._finite(box)
        return torch.full_like(eps, 0.15 * (box[1] - box[0]))


Region = Lp | L0 | Patch | Words

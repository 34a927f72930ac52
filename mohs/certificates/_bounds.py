"""Sound enclosures of a net's values over a ball: intervals forwards, linear functions backwards.

Everything here is a lower bound of what it names, rounding included (see ``_layers``): a value that cannot be bounded,
because something overflows, comes out as -inf and certifies nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mohs.certificates._layers import Affine, Arithmetic, Layer, ReLU, Reshape, gamma, safe_norm
from mohs.certificates._net import Net
from mohs.regions import Box, Lp


def _dual_exponent(p: float) -> float:
    if p == 1:
        return math.inf
    return 1.0 if math.isinf(p) else p / (p - 1)


def _norm(v: Tensor, q: float, arithmetic: Arithmetic) -> Tensor:
    """q-norm of each row, rounded up."""
    return safe_norm(v, q) * (1 + gamma(2 * v[0].numel() + 16, arithmetic.u_bound))


def _dot(a: Tensor, values: Tensor, rows: Tensor | int) -> Tensor:
    """Inner products [P] of functions [P, ...] with ``values`` [N, ...] of one row, or of a row each."""
    if isinstance(rows, int):
        return a.flatten(1) @ values[rows].flatten()
    return (a.flatten(1) * values.flatten(1)[rows]).sum(1)


@dataclass
class Ball:
    """Points between ``lower`` and ``upper`` [N, ...]; with ``radius`` [N] also within it of ``center`` in p-norm."""

    lower: Tensor
    upper: Tensor
    arithmetic: Arithmetic
    center: Tensor | None = None
    radius: Tensor | None = None
    q: float = 1.0

    @classmethod
    def around(cls, x0: Tensor, region: Lp, box: Box, arithmetic: Arithmetic) -> Ball:
        """Every point an attack could hand in for ``x0``: the region with all the rounding it tolerates, in the box."""
        unit = torch.finfo(x0.dtype).eps
        u, size = arithmetic.u_bound, x0[0].numel()
        center = x0.to(arithmetic.bound)
        largest = center.flatten(1).abs().amax(1)
        # Lp.contains: 1e-5 relative, one unit in the last place of the point per coordinate, and a norm computed in x0's own dtype
        summing = 4 * unit + (0.0 if math.isinf(region.p) else gamma(size + 4, unit / 2))
        radius = (region.eps * 1.00001 + (largest + region.eps) * (unit * size ** (1 / region.p))) * (
            1 + summing + 8 * u
        )
        reach = radius.view(-1, *[1] * (x0.dim() - 1))
        slack = 8 * u
        lower = (center - reach) - slack * (center.abs() + reach)
        upper = (center + reach) + slack * (center.abs() + reach)
        # the edges as rounded to x0's dtype; an infinite one is its own
        lo, hi = (edge + sign * (2 * unit + slack) * abs(edge) for edge, sign in zip(box, (-1, 1)))
        return cls(
            lower.nan_to_num_(nan=-math.inf, neginf=-math.inf).clamp_min_(lo),
            upper.nan_to_num_(nan=math.inf, posinf=math.inf).clamp_max_(hi),
            arithmetic,
            *((None, None, 1.0) if math.isinf(region.p) else (center, radius, _dual_exponent(region.p))),
        )

    def minimum(self, a: Tensor, rows: Tensor | int) -> Tensor:
        """Lower bounds of the linear functions ``a`` [P, ...] over the balls of ``rows`` (one, or [P]), without offset."""
        a = a.flatten(1)
        size = torch.maximum(self.lower.abs(), self.upper.abs())
        best = _dot(a.clamp_min(0), self.lower, rows) + _dot(a.clamp_max(0), self.upper, rows)
        if self.center is not None and self.radius is not None:
            best = best.fmax(_dot(a, self.center, rows) - self.radius[rows] * _norm(a, self.q, self.arithmetic))
        return best - gamma(2 * a.shape[1] + 16, self.arithmetic.u_bound) * _dot(a.abs(), size, rows)


@dataclass
class Passage:
    """What one forward pass over the balls leaves behind for the passes backwards, by layer index.

    ``rounding`` of the affine layers; of a ReLU the slope of the line below, and slope and offset of the line above;
    ``hull``: the values behind the last ReLU.
    """

    ball: Ball
    rounding: dict[int, Tensor] = field(default_factory=dict)
    below: dict[int, Tensor] = field(default_factory=dict)
    above: dict[int, Tensor] = field(default_factory=dict)
    offset: dict[int, Tensor] = field(default_factory=dict)
    hull: Ball | None = None


def enclose(net: Net, ball: Ball, specs: int | None) -> Passage:
    """One pass forwards: bounds of every layer's inputs.

    Args:
        net: the layers.
        ball: where the inputs lie.
        specs: None for intervals only; else each interval that crosses zero before a ReLU is tightened by passes
            backwards, this many linear functions at a time.
    """
    passage = Passage(ball)
    lower, upper = ball.lower, ball.upper
    for i, layer in enumerate(net.layers):
        if isinstance(layer, Reshape):
            lower, upper = lower.reshape(-1, *layer.out_shape), upper.reshape(-1, *layer.out_shape)
        elif isinstance(layer, ReLU):
            if specs is not None and net.mixed(i) > 1:  # up to the first mixing layer an interval is as good
                lower, upper = _tighten(net, passage, i, lower, upper, specs)
            _draw_lines(passage, i, lower, upper)
            lower, upper = lower.clamp_min(0), upper.clamp_min(0)
            passage.hull = Ball(lower, upper, net.arithmetic)
        else:
            lower, upper = _affine_interval(net, passage, i, layer, lower, upper)
    return passage


def _affine_interval(
    net: Net, passage: Passage, i: int, layer: Affine, lower: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor]:
    """Bounds of the layer's outputs from bounds of its inputs."""
    size = torch.maximum(lower.abs(), upper.abs())
    rounding = passage.rounding[i] = layer.rounding(size, net.arithmetic)
    middle = layer.apply(lower / 2 + upper / 2)
    reach = layer.magnitude(upper / 2 - lower / 2) + rounding
    low, high = middle - reach, middle + reach
    dual = _dual_interval(net, passage, i, layer)
    if dual is not None:
        low, high = low.fmax(dual[0]), high.fmin(dual[1])
    # nan: nothing is known
    return low.nan_to_num(nan=-math.inf, neginf=-math.inf), high.nan_to_num(nan=math.inf, posinf=math.inf)


def _dual_interval(net: Net, passage: Passage, i: int, layer: Affine) -> tuple[Tensor, Tensor] | None:
    """Bounds of the outputs of the first mixing layer by the dual norms of its rows; None for Linf or another layer."""
    ball = passage.ball
    if ball.center is None or ball.radius is None or not layer.mixes or net.mixed(i) > 0:
        return None
    center, spread = ball.center, torch.zeros_like(ball.center)
    scale = center.new_ones(net.in_shape)
    for j, earlier in enumerate(net.layers[:i]):  # the diagonal layers in front become part of the rows
        if isinstance(earlier, ReLU):
            return None
        if isinstance(earlier, Reshape):
            scale = scale.reshape(earlier.out_shape)
            center, spread = center.reshape(-1, *earlier.out_shape), spread.reshape(-1, *earlier.out_shape)
        else:
            scale = earlier.magnitude(scale)
            center, spread = earlier.apply(center), earlier.magnitude(spread) + passage.rounding[j]
    norm = layer.row_norm(ball.q, scale)
    if norm is None:
        return None
    norm = norm * (1 + gamma(2 * layer.fan_in + 64, net.arithmetic.u_bound))
    middle = layer.apply(center)
    reach = ball.radius.view(-1, *[1] * (middle.dim() - 1)) * norm + layer.magnitude(spread) * 1.01
    reach = reach + passage.rounding[i]
    return middle - reach, middle + reach


def output_interval(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds [N, K] of the executed logits at the points ``x`` themselves: the exact ones with all rounding."""
    point = x.to(net.arithmetic.bound)
    lower = upper = point
    passage = Passage(Ball(point, point, net.arithmetic))
    for i, layer in enumerate(net.layers):
        if isinstance(layer, Reshape):
            lower, upper = lower.reshape(-1, *layer.out_shape), upper.reshape(-1, *layer.out_shape)
        elif isinstance(layer, ReLU):
            lower, upper = lower.clamp_min(0), upper.clamp_min(0)
        else:
            lower, upper = _affine_interval(net, passage, i, layer, lower, upper)
    return lower, upper


def _draw_lines(passage: Passage, i: int, lower: Tensor, upper: Tensor) -> None:
    """Lines around max(z, 0) on [lower, upper]: below z * below, above z * above + offset.

    Where the sign is known both are the function itself. Else the line above joins the end points; the offset is the
    least that is sound for the slope as rounded. The line below is z or 0, whichever leaves the smaller area.
    """
    one, zero = torch.ones_like(lower), torch.zeros_like(lower)
    slope = (upper / (upper - lower)).clamp(0, 1)
    info = torch.finfo(lower.dtype)
    offset = torch.maximum(-slope * lower, (1 - slope) * upper) * (1 + 8 * info.eps) + info.tiny
    active, dead = lower >= 0, upper <= 0
    passage.above[i] = torch.where(active, one, torch.where(dead, zero, slope))
    passage.offset[i] = torch.where(active | dead, zero, offset)
    passage.below[i] = torch.where(active | (~dead & (upper > -lower)), one, zero)


def _tighten(net: Net, passage: Passage, i: int, lower: Tensor, upper: Tensor, specs: int) -> tuple[Tensor, Tensor]:
    """Intersect the intervals before ReLU ``i`` that cross zero with the bounds of passes backwards from there."""
    shape = lower.shape
    low, high = lower.flatten(1).clone(), upper.flatten(1).clone()
    crossing = (low < 0) & (high > 0)
    last = max(j for j in range(i) if isinstance(net.layers[j], Affine))  # only reshapes stand between it and the ReLU
    layer = net.layers[last]
    if not isinstance(layer, Affine) or any(isinstance(between, ReLU) for between in net.layers[last:i]):
        return lower, upper  # a ReLU's input is itself the output of one, and never crosses zero
    for row in range(len(low)):  # row by row, as functions of one ball need no copies of what they meet
        rounding = passage.rounding[last][row].flatten()
        offset = layer.offset()
        offset = torch.zeros_like(rounding) if offset is None else offset.expand(layer.out_shape).flatten()
        for outputs in crossing[row].nonzero().flatten().split(specs):
            if len(outputs) == 0:  # split gives one empty part
                break
            a = layer.rows(outputs, low)
            least = offset[outputs] - rounding[outputs]
            most = offset[outputs] + rounding[outputs]
            low[row, outputs] = low[row, outputs].fmax(backwards(net, passage, a, row, last, constant=least))
            high[row, outputs] = high[row, outputs].fmin(-backwards(net, passage, -a, row, last, constant=-most))
    return low.view(shape), high.view(shape)


def backwards(
    net: Net,
    passage: Passage,
    a: Tensor,
    rows: Tensor | int,
    start: int,
    stop: int = 0,
    constant: Tensor | None = None,
) -> Tensor:
    """Lower bounds [P] of linear functions of the values before layer ``start``.

    Substitutes layer by layer down to the values before layer ``stop`` (0: the input; else just behind the last ReLU),
    and takes the minimum there.

    Args:
        net: the layers.
        passage: of the forward pass, complete up to ``start``.
        a: [P, ...] linear functions.
        rows: which ball each is about: one for all, or [P].
        start, stop: layer indices.
        constant: [P] added to the functions.
    """
    u = net.arithmetic.u_bound
    total = a.new_zeros(len(a)) if constant is None else constant
    spent = total.abs()  # sum of magnitudes, for the rounding of the total
    for i in range(start - 1, stop - 1, -1):
        layer: Layer = net.layers[i]
        if isinstance(layer, Reshape):
            a = a.reshape(-1, *layer.in_shape)
            continue
        up = 1 + gamma(a[0].numel() + 16, u)
        if isinstance(layer, ReLU):
            term = _dot(a.clamp_max(0), passage.offset[i], rows) * up
            one = slice(rows, rows + 1) if isinstance(rows, int) else rows
            a = a * torch.where(a > 0, passage.below[i][one], passage.above[i][one])
        else:
            term = -_dot(a.abs(), passage.rounding[i], rows) * up
            offset = layer.offset()
            if offset is not None:
                shift = a.flatten(1) @ offset.expand(layer.out_shape).flatten()
                total, spent = total + shift, spent + shift.abs()
            a = layer.adjoint(a)
        total, spent = total + term, spent + term.abs()
    ball = passage.ball if stop == 0 or passage.hull is None else passage.hull
    end = ball.minimum(a, rows)
    return total + end - gamma(4 * (start - stop) + 12, u) * (spent + end.abs())


def margins(net: Net, passage: Passage, y: Tensor, specs: int, stop: int) -> Tensor:
    """Lower bounds [N, K - 1] of z_y - z_k for every other class k (of z or -z for a single logit), -inf for nan."""
    rows = torch.arange(len(y), device=y.device)
    if net.classes == 1:
        functions = (2 * y - 1).to(net.arithmetic.bound).view(-1, 1)
        others = 1
    else:
        others = net.classes - 1
        classes = torch.arange(others, device=y.device).expand(len(y), -1)
        rival = classes + (classes >= y.unsqueeze(1))
        rows = rows.repeat_interleave(others)
        eye = torch.eye(net.classes, dtype=net.arithmetic.bound, device=y.device)
        functions = eye[y[rows]] - eye[rival.flatten()]
    parts = [
        backwards(net, passage, a, row, len(net.layers), stop)
        for a, row in zip(functions.split(specs), rows.split(specs))
    ]
    return torch.cat(parts).view(-1, others).nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)

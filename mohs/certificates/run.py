"""The verb ``certify`` and its result; what every certificate has in common."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from mohs._rows import Rows
from mohs.certificates import _bounds
from mohs.certificates._net import Net, read_net
from mohs.errors import DataError, ModelError, ThreatError, UsageError, rows_text
from mohs.regions import Lp
from mohs.target import classify
from mohs.threat import Access, Threat


@dataclass
class Certificate(Rows):
    """What is proven of each row.

    Args:
        holds: [N] bool: no allowed change alters the answer, and the answer is right.
        radius: [N] the threat's eps where it holds, 0 where not.
        margin_bound: [N] proven lower bound, over all allowed changes, of the least z_y - z_k; -inf: nothing known.
        failure: probability that a row's certificate is wrong; 0.0 for a deterministic one.
        name: of the method.
    """

    holds: Tensor
    radius: Tensor
    margin_bound: Tensor
    failure: float = field(default=0.0)
    name: str = ""


class Method(Protocol):
    """A certificate: a frozen dataclass whose fields are its configuration."""

    name: ClassVar[str]
    needs: ClassVar[Access]

    def prove(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, batch: int) -> Certificate:
        """Certify checked inputs; see ``certify``."""
        ...


def certify(
    certificate: Method, model: nn.Module, x: Tensor, y: Tensor, threat: Threat | str, *, batch: int = 64
) -> Certificate:
    """Prove, row by row, that no change the threat allows alters the right answer.

    A row that does not hold is not broken: it is undecided, unless an attack breaks it. What is proven of this
    adversary is proven of every weaker one, so access, queries and knowledge of the threat play no part.

    Args:
        certificate: such as ``IBP()`` or ``CROWN()``.
        model: in eval mode; from inputs in the box [N, ...] to logits [N, K], or one logit per input.
        x: [N, ...] clean inputs in the threat's box.
        y: [N] labels, int64.
        threat: or its short form, such as ``"linf:2/255"``.
        batch: rows at a time. Rows do not influence each other beyond rounding.

    Returns:
        A ``Certificate`` with one entry per row.

    Raises:
        DataError: inputs outside the box or not finite, or labels that are no classes.
        ModelError: the net cannot be read, or does not compute what its layers say.
        ThreatError: the certificate does not cover the region.

    >>> from mohs.certificates import IBP
    >>> net = nn.Sequential(nn.Linear(2, 2))
    >>> _ = net[0].weight.data.copy_(torch.eye(2)), net[0].bias.data.zero_()
    >>> certify(IBP(), net, torch.tensor([[0.8, 0.2]]), torch.tensor([0]), "linf:0.25").holds.tolist()
    [True]
    """
    threat = Threat.parse(threat)
    if batch < 1:
        raise UsageError(f"certify got batch={batch}. Give the number of rows at a time, at least 1.")
    _check_inputs(x, y, threat)
    with torch.no_grad():
        return certificate.prove(model, x.detach(), y.to(x.device, torch.int64), threat, batch)


def prove_by_bounds(
    name: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    batch: int,
    dtype: torch.dtype,
    memory: int | None,
) -> Certificate:
    """IBP (``memory`` None) and CROWN (MiB it may use per batch) over the shared bounds."""
    region = threat.region
    if not isinstance(region, Lp):
        raise ThreatError(
            f"{name} covers balls of a norm; got the threat {threat}. Allowed: linf, l2, l1 and other p >= 1."
        )
    if dtype not in (torch.float32, torch.float64):
        raise UsageError(f"{name} computes bounds in torch.float64 or torch.float32; got dtype={dtype}.")
    net = read_net(model, x, dtype)
    _check_labels(y, max(net.classes, 2))
    bounds = [x.new_zeros(0, dtype=dtype)]
    for first in range(0, len(x), batch):
        rows = slice(first, first + batch)
        right = _check_reading(net, model, x[rows], y[rows], first)
        ball = _bounds.Ball.around(x[rows], region, threat.box, net.arithmetic)
        specs = max(1, ((memory or 256) << 20) // (8 * net.widest * dtype.itemsize))
        passage = _bounds.enclose(net, ball, specs if memory else None)
        bound = _bounds.margins(net, passage, y[rows], specs, net.after_relu)
        if memory and net.after_relu:
            bound = torch.maximum(bound, _bounds.margins(net, passage, y[rows], specs, 0))
        bound = bound.amin(1) if bound.shape[1] else bound.new_full((len(bound),), math.inf)
        bounds.append(torch.where(right, bound, bound.clamp_max(0.0)))
    margin_bound = torch.cat(bounds)
    holds = margin_bound > 0
    return Certificate(holds, torch.where(holds, region.eps, 0.0), margin_bound, 0.0, name)


def _check_inputs(x: Tensor, y: Tensor, threat: Threat) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
        what = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise DataError(f"certify needs floating-point inputs [N, ...]; got {what}. Convert them first.")
    if not isinstance(y, Tensor) or y.is_floating_point() or y.shape != x.shape[:1]:
        what = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise DataError(f"certify needs one integer label per input, [{len(x)}]; got {what}.")
    lo, hi = threat.box
    slack = torch.finfo(x.dtype).eps
    low, high = lo - slack * abs(lo) if math.isfinite(lo) else lo, hi + slack * abs(hi) if math.isfinite(hi) else hi
    outside = ~(x.isfinite() & (x >= low) & (x <= high)).flatten(1).all(1)
    if bool(outside.any()):
        raise DataError(
            f"certify needs finite inputs in the threat's box [{lo:g}, {hi:g}]; not so in "
            f"{rows_text(outside.nonzero().flatten())}. Scale the inputs, put the normalisation into the model, or give "
            "Threat(box=...)."
        )


def _check_labels(y: Tensor, classes: int) -> None:
    wrong = (y < 0) | (y >= classes)
    if bool(wrong.any()):
        raise DataError(
            f"The net has {classes} classes, 0 to {classes - 1}; other labels came in "
            f"{rows_text(wrong.nonzero().flatten())}. Check that model and data belong together."
        )


def _check_reading(net: Net, model: nn.Module, x: Tensor, y: Tensor, first: int) -> Tensor:
    """Run the model: [N] bool, is the answer right? Its logits must lie within the rounding of the layers as read."""
    logits = classify(model, x)
    classes = max(net.classes, 2)
    differs = torch.ones_like(y, dtype=torch.bool)
    if logits.shape[1] == classes:
        low, high = _bounds.output_interval(net, x)
        executed = logits.to(net.arithmetic.bound)[:, -net.classes :]
        differs = ((executed < low) | (executed > high)).any(1)
    if bool(differs.any()):
        raise ModelError(
            "The model answers differently from its layers as a certificate reads them "
            f"({rows_text(differs.nonzero().flatten() + first)}). "
            "Either a layer computes something else than its type says, or it runs in less than the precision of its "
            "weights (TF32, autocast): switch that off."
        )
    lead = logits.gather(1, y.unsqueeze(1)) - logits.scatter(1, y.unsqueeze(1), -math.inf).amax(1, keepdim=True)
    return lead.squeeze(1) > 0

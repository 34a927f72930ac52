"""How far from the optimum: smallest changes found, against models whose smallest change is known exactly.

Linear models have closed forms, with and without a box. Small ReLU nets are solved: as mixed-integer programs for Linf, L1
and L0, by enumeration of their linear regions for L2. All in float64.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import mohs
from mohs import Threat
from mohs.attacks import REGISTRY
from mohs.errors import MohsError

from .measure import table
from .minimum import serves
from .subjects import SEED, Options

LINEAR_ROWS, RELU_ROWS = 64, 24
FEATURES, CLASSES = 100, 5
RELU_FEATURES, HIDDEN, RELU_CLASSES = 8, 8, 3
HEAD = ["model", "norm", "attack", "found", "median ratio", "worst ratio", "within 1%"]
OPEN, UNIT = (-math.inf, math.inf), (0.0, 1.0)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Solved:
    """A model, inputs with its own answers as labels, the box, and the exact smallest size per norm."""

    name: str
    net: nn.Module
    x: Tensor
    y: Tensor
    box: tuple[float, float]
    best: Callable[[str], Array]


def run(options: Options) -> Iterator[str]:
    """One table of every model, norm and attack."""
    yield "## Against exact optima"
    yield (
        f"Linear: {FEATURES} features, {CLASSES} classes, {LINEAR_ROWS} inputs. ReLU: {RELU_FEATURES} features, {HIDDEN} hidden units, "
        f"{RELU_CLASSES} classes, {RELU_ROWS} inputs in [0, 1]. Attacks with their default settings; ratio: size found over exact "
        "size, of the rows that were found. L0 counts features."
    )
    rows = []
    for solved in (linear(UNIT), linear(OPEN), relu()):
        for norm in options.norms:
            best = solved.best(norm)
            for name, kind in REGISTRY.items():
                if options.attacks and name not in options.attacks:
                    continue
                threat = Threat(Threat.parse(_form(norm)).region, box=solved.box)
                if serves(kind, threat):
                    rows.append([solved.name, norm, name, *_cells(kind, solved, threat, best)])
    options.keep("exact", [dict(zip(HEAD, row, strict=True)) for row in rows])
    yield table(HEAD, rows)


def _form(norm: str) -> str:
    return "l0-features:inf" if norm == "l0" else f"{norm}:inf"


def _cells(kind: type, solved: Solved, threat: Threat, best: Array) -> list[object]:
    try:
        size = mohs.attack(kind(), solved.net, solved.x, solved.y, threat, seed=SEED).size.numpy()
    except (MohsError, NotImplementedError) as error:
        return [f"refused: {' '.join(str(error).split())[:60]}", "-", "-", "-"]
    found = np.isfinite(size)
    ratio = size[found] / best[found]
    if not len(ratio):
        return [f"0/{len(size)}", "-", "-", "-"]
    within = int((ratio <= 1.01).sum())
    return [f"{len(ratio)}/{len(size)}", f"{np.median(ratio):.4f}", f"{ratio.max():.4f}", f"{within}/{len(size)}"]


# ---- linear models ----------------------------------------------------------------------------------------


def linear(box: tuple[float, float]) -> Solved:
    """A random linear model whose classes all occur."""
    draw = torch.Generator().manual_seed(SEED)
    weight = torch.randn(CLASSES, FEATURES, generator=draw, dtype=torch.float64)
    x = torch.rand(LINEAR_ROWS, FEATURES, generator=draw, dtype=torch.float64)
    net = nn.Linear(FEATURES, CLASSES, dtype=torch.float64).eval()
    with torch.no_grad():
        net.weight.copy_(weight)
        net.bias.copy_(-(x @ weight.T).mean(0))
        y = net(x).argmax(1)

    def best(norm: str) -> Array:
        w, b = weight.numpy(), net.bias.detach().numpy()
        return np.array([_nearest(w, b, row, int(label), box, norm) for row, label in zip(x.numpy(), y, strict=True)])

    return Solved("linear, box [0, 1]" if box == UNIT else "linear, no box", net, x, y, box, best)


def _nearest(w: Array, b: Array, x: Array, y: int, box: tuple[float, float], norm: str) -> float:
    z = w @ x + b
    others = [k for k in range(len(z)) if k != y]
    return min(hyperplane(w[k] - w[y], z[y] - z[k], x, box, norm) for k in others)


def hyperplane(a: Array, gap: float, x: Array, box: tuple[float, float], norm: str) -> float:
    """The smallest size of d with a . d >= gap and x + d in the box; inf where there is none.

    >>> a, x = np.array([3.0, 4.0]), np.array([0.5, 0.9])
    >>> [round(hyperplane(a, 1.0, x, OPEN, norm), 4) for norm in NORMS]
    [0.1429, 0.2, 0.25, 1.0]
    >>> [round(hyperplane(a, 1.0, x, UNIT, norm), 4) for norm in NORMS]
    [0.2, 0.2236, 0.3, 1.0]
    """
    room, slope = np.where(a > 0, box[1] - x, x - box[0]), np.abs(a)
    room, slope = room[slope > 0], slope[slope > 0]
    if (slope * room).sum() < gap:
        return math.inf
    if norm == "l0":
        return float(1 + np.searchsorted(np.cumsum(np.sort(slope * room)[::-1]), gap))
    if norm == "l1":
        order = np.argsort(-slope)
        gained = np.cumsum((slope * room)[order])
        last = int(np.searchsorted(gained, gap))
        before = gained[last - 1] if last else 0.0
        return float(room[order][:last].sum() + (gap - before) / slope[order][last])
    # what each feature moves grows with t until its room is used up: t itself for Linf, t * slope for L2
    speed = np.ones_like(slope) if norm == "linf" else slope
    full = np.argsort(room / speed)
    for used in range(len(full) + 1):
        done, free = full[:used], full[used:]
        if not len(free):
            break
        t = (gap - (slope * room)[done].sum()) / (slope * speed)[free].sum()
        if t <= (room / speed)[free[0]]:
            break
    moved = np.minimum(room, t * speed)
    return float(moved.max() if norm == "linf" else np.linalg.norm(moved))


# ---- small ReLU nets --------------------------------------------------------------------------------------


def relu() -> Solved:
    """One hidden layer; the classes all occur and the box binds for some of the inputs."""
    draw = torch.Generator().manual_seed(SEED)
    first, last = nn.Linear(RELU_FEATURES, HIDDEN), nn.Linear(HIDDEN, RELU_CLASSES)
    net = nn.Sequential(first, nn.ReLU(), last).double().eval()
    x = torch.rand(RELU_ROWS, RELU_FEATURES, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        for layer in (first, last):
            weight = torch.randn(layer.weight.shape, generator=draw, dtype=torch.float64)
            layer.weight.copy_(weight / math.sqrt(weight.shape[1]))
        first.bias.copy_(-(x @ first.weight.T).mean(0))
        last.bias.zero_()
        last.bias.copy_(-net(x).mean(0))
        y = net(x).argmax(1)

    def best(norm: str) -> Array:
        solve = _by_regions if norm == "l2" else _by_program
        pairs = zip(x.numpy(), y.tolist(), strict=True)
        return np.array(
            [min(solve(net, row, label, k, norm) for k in range(RELU_CLASSES) if k != label) for row, label in pairs]
        )

    return Solved("ReLU, box [0, 1]", net, x, y, UNIT, best)


def _weights(net: nn.Module) -> tuple[Array, Array, Array, Array]:
    first, second = (layer for layer in net.modules() if isinstance(layer, nn.Linear))
    w1, b1, w2, b2 = (p.detach().numpy() for p in (first.weight, first.bias, second.weight, second.bias))
    return w1, b1, w2, b2


def _by_regions(net: nn.Module, x: Array, y: int, k: int, norm: str) -> float:
    """L2: the nearest point of each linear region where class k reaches class y; each is a least-distance problem."""
    w1, b1, w2, b2 = _weights(net)
    z = w1 @ x + b1
    best = math.inf
    for pattern in itertools.product((False, True), repeat=HIDDEN):
        on = np.array(pattern)
        sign = np.where(on, 1.0, -1.0)[:, None]
        c = (w2[k] - w2[y]) * on
        rows = np.concatenate([(c @ w1)[None], sign * w1, np.eye(len(x)), -np.eye(len(x))])
        least = np.concatenate([[-(c @ z + b2[k] - b2[y])], -(sign[:, 0] * z), -x, x - 1])
        best = min(best, least_distance(rows, least))
    return best


def least_distance(rows: Array, least: Array) -> float:
    """min ||d||_2 subject to rows @ d >= least, inf where nothing fits: Lawson and Hanson's LDP, chapter 23.4.

    >>> least_distance(np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([5.0, -9.0]))
    1.0
    """
    from scipy.optimize import nnls

    stacked = np.vstack([rows.T, least])
    target = np.zeros(len(stacked))
    target[-1] = 1.0
    multipliers, _ = nnls(stacked, target)
    residual = stacked @ multipliers - target
    if np.linalg.norm(residual) < 1e-9:
        return math.inf
    return float(np.linalg.norm(residual[:-1] / residual[-1]))


def _by_program(net: nn.Module, x: Array, y: int, k: int, norm: str) -> float:
    """Linf, L1, L0: one mixed-integer program over (d, hidden, active, extra); every bound follows from the box."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    w1, b1, w2, b2 = _weights(net)
    n, h = len(x), HIDDEN
    z = w1 @ x + b1
    low_d, high_d = -x, 1 - x
    highest = z + np.maximum(w1 * high_d, w1 * low_d).sum(1)
    lowest = z + np.minimum(w1 * high_d, w1 * low_d).sum(1)
    extra = 1 if norm == "linf" else n
    eye_n, eye_h, zero = np.eye(n), np.eye(h), np.zeros
    c = w2[k] - w2[y]
    cap = {"linf": np.ones((n, 1)), "l1": eye_n}.get(norm)
    blocks = [  # rows of (d, hidden, active, extra) and their lower and upper ends
        (np.hstack([zero((1, n)), c[None], zero((1, h + extra))]), b2[y] - b2[k], np.inf),
        (np.hstack([-w1, eye_h, zero((h, h + extra))]), z, np.inf),  # hidden >= before
        (np.hstack([-w1, eye_h, np.diag(-lowest), zero((h, extra))]), -np.inf, z - lowest),  # <= before where active
        (np.hstack([zero((h, n)), eye_h, np.diag(-highest), zero((h, extra))]), -np.inf, 0.0),  # 0 where not
    ]
    if cap is not None:
        for sign in (1.0, -1.0):
            blocks.append((np.hstack([sign * eye_n, zero((n, 2 * h)), -cap]), -np.inf, 0.0))
    else:  # a feature moves only where its switch is on
        blocks.append((np.hstack([eye_n, zero((n, 2 * h)), np.diag(-high_d)]), -np.inf, 0.0))
        blocks.append((np.hstack([eye_n, zero((n, 2 * h)), np.diag(-low_d)]), 0.0, np.inf))
    integer = np.concatenate([zero(n + h), np.ones(h), np.full(extra, float(cap is None))])
    bounds = Bounds(
        np.concatenate([low_d, zero(h), zero(h), zero(extra)]),
        np.concatenate([high_d, np.maximum(highest, 0), np.ones(h), np.ones(extra)]),
    )
    constraints = [LinearConstraint(rows, lower, upper) for rows, lower, upper in blocks]
    goal = np.concatenate([zero(n + 2 * h), np.ones(extra)])
    with _silent_output():
        found = milp(goal, integrality=integer, bounds=bounds, constraints=constraints, options={"mip_rel_gap": 0.0})
    return float(found.fun) if found.success else math.inf


@contextmanager
def _silent_output() -> Iterator[None]:
    """The solver writes remarks past Python's own standard output, into the middle of the page."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)

"""Nets, points and exact answers for the tests of certificates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from mohs.regions import Lp


def random_net(*widths: int, seed: int = 0, dtype: torch.dtype = torch.float64, gain: float = 1.5) -> nn.Sequential:
    """Linear and ReLU layers in turn, with weights large enough to cross zero."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layer = nn.Linear(inputs, outputs, dtype=dtype)
        layer.weight.data = (gain * torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs)).to(dtype)
        layer.bias.data = (0.3 * torch.randn(outputs, generator=generator)).to(dtype)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def conv_net(seed: int = 0) -> nn.Sequential:
    """One of every supported layer, in float32 as nets are deployed."""
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=(1, 2), bias=False),
        nn.BatchNorm2d(4, eps=0.05),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 6, 2, dilation=2, groups=2, stride=(1, 2)), nn.Identity(), nn.ReLU()),
        nn.AvgPool2d(2, 1, padding=1, count_include_pad=False),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.LazyLinear(5),
        nn.BatchNorm1d(5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )
    net(torch.rand(64, 2, 9, 8))  # running statistics, and the shape of the lazy layer
    torch.random.set_rng_state(torch_state)
    return net.eval()


def margin(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Least z_y - z_k of the executed net."""
    with torch.no_grad():
        z = model(x)
    if z.dim() == 1 or z.shape[1] == 1:
        return z.view(-1) * (2 * y - 1)
    own = y.unsqueeze(1)
    return (z.gather(1, own) - z.scatter(1, own, -math.inf).amax(1, keepdim=True)).squeeze(1)


def answers(model: nn.Module, x: Tensor) -> Tensor:
    """The net's own answers as labels, so that every row is right to begin with."""
    with torch.no_grad():
        z = model(x)
    return z.argmax(1) if z.dim() == 2 and z.shape[1] > 1 else (z.view(-1) > 0).long()


def points(region: Lp, x0: Tensor, box: tuple[float, float], count: int, seed: int = 0) -> Tensor:
    """[count, N, ...] points of ball and box: random ones, extreme ones, and random ones pushed to the surface."""
    generator = torch.Generator().manual_seed(seed)
    eps = torch.full((len(x0),), region.eps, dtype=x0.dtype)
    found = []
    for i in range(count):
        direction = torch.randn(x0.shape, generator=generator).to(x0.dtype)
        if i % 2:
            found.append(region.extreme(direction, x0, eps, box))
        else:
            found.append(region.project(x0 + 3 * region.eps * direction, x0, eps, box))
    return torch.stack(found)


def least_margin_by_milp(net: nn.Sequential, x0: Tensor, label: int, eps: float, box: tuple[float, float]) -> float:
    """The exact least margin over an Linf ball in a box, by mixed-integer programming (big-M from intervals)."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    weights = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in net if isinstance(m, nn.Linear)]
    low = np.maximum(x0.numpy() - eps, box[0])
    high = np.minimum(x0.numpy() + eps, box[1])
    lows, highs, whole = [low], [high], [np.zeros(len(low))]
    rows: list[tuple[dict[int, float], float, float]] = []
    first, total = 0, len(low)
    for w, b in weights[:-1]:
        mid, reach = w @ ((low + high) / 2) + b, np.abs(w) @ ((high - low) / 2)
        floor, u = mid - reach - 1e-9, mid + reach + 1e-9
        out, on = total, total + len(b)
        for j in range(len(b)):
            z = {first + i: float(w[j, i]) for i in range(w.shape[1])}
            rows.append(({**{k: -v for k, v in z.items()}, out + j: 1.0}, b[j], np.inf))  # a >= z
            rows.append(
                (
                    {**{k: -v for k, v in z.items()}, out + j: 1.0, on + j: -min(floor[j], 0)},
                    -np.inf,
                    b[j] - min(floor[j], 0),
                )
            )
            rows.append(({out + j: 1.0, on + j: -max(u[j], 0)}, -np.inf, 0.0))
        lows += [np.zeros(len(b)), np.zeros(len(b))]
        highs += [np.maximum(u, 0), np.ones(len(b))]
        whole += [np.zeros(len(b)), np.ones(len(b))]
        low, high = np.maximum(floor, 0), np.maximum(u, 0)
        first, total = out, on + len(b)
    w, b = weights[-1]
    matrix = np.zeros((len(rows), total))
    for r, (entries, _, _) in enumerate(rows):
        for column, value in entries.items():
            matrix[r, column] += value
    limits = [LinearConstraint(matrix, [r[1] for r in rows], [r[2] for r in rows])] if rows else []
    best = math.inf
    for k in range(len(b)):
        if k == label:
            continue
        cost = np.zeros(total)
        cost[first : first + w.shape[1]] = w[label] - w[k]
        answer = milp(
            cost,
            constraints=limits,
            integrality=np.concatenate(whole),
            bounds=Bounds(np.concatenate(lows), np.concatenate(highs)),
            options={"mip_rel_gap": 0.0},
        )
        assert answer.status == 0
        best = min(best, float(answer.fun + b[label] - b[k]))
    return best

"""The doctor, before and after an evaluation, on healthy nets of many shapes, trained here: what it warns of where nothing is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import mohs
from mohs.attacks import PGD
from mohs.data import load

from .measure import table
from .subjects import Options

EPS, EPOCHS, BATCH, PLAN = 0.1, 25, 64, "quick"
COLUMNS = ["training", "net", "accuracy", "promise kept", "robust", "added", "said", "mended"]
HELD = 200  # images that are checked, and not trained on


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _mlp(*widths: int, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in zip((784, *widths), (*widths, 10), strict=True):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


def _conv(width: int, act: Callable[[], nn.Module] = nn.ReLU, norm: bool = False, pool: bool = False) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in ((1, width), (width, 2 * width)):
        layers += [
            nn.Conv2d(a, b, 3 if pool else 4, 1 if pool else 2, 1),
            *([nn.BatchNorm2d(b)] if norm else []),
            act(),
        ]
        layers += [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * width * 49, 10))


def _average(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 5, 2, 2), nn.GELU(), nn.Conv2d(width, width, 3, 2, 1), nn.GELU(),
        Residual(nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1)), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(4 * width, 10),
    )  # fmt: skip


NETS: dict[str, Callable[[], nn.Module]] = {
    "linear": _mlp,
    "mlp 64": lambda: _mlp(64),
    "mlp 128-64": lambda: _mlp(128, 64),
    "mlp 64 tanh": lambda: _mlp(64, act=nn.Tanh),
    "mlp 64 sigmoid": lambda: _mlp(64, act=nn.Sigmoid),
    "mlp 256 gelu": lambda: _mlp(256, act=nn.GELU),
    "mlp layernorm": lambda: nn.Sequential(
        nn.Flatten(), nn.LayerNorm(784), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)
    ),
    "conv 8": lambda: _conv(8),
    "conv 16 elu": lambda: _conv(16, nn.ELU),
    "conv 8 batchnorm": lambda: _conv(8, norm=True),
    "conv 8 maxpool": lambda: _conv(8, pool=True),
    "conv 8 leaky, dropout": lambda: nn.Sequential(nn.Dropout(0.1), _conv(8, nn.LeakyReLU)),
    "residual, average pooling": lambda: _average(16),
}
ROBUST = (
    "linear",
    "mlp 64",
    "mlp 64 tanh",
    "conv 8",
    "conv 16 elu",
    "conv 8 batchnorm",
    "conv 8 maxpool",
    "residual, average pooling",
)


def trained(make: Callable[[], nn.Module], x: Tensor, y: Tensor, robust: bool, seed: int) -> nn.Module:
    """A net fitted to the images, or to the worst points near them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make()
        optimiser = torch.optim.Adam(net.parameters(), 2e-3)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(x)).split(BATCH):
                a, b = x[rows], y[rows]
                if robust:
                    a = mohs.attack(
                        PGD(steps=3), net.eval(), a, b, f"linf:{EPS}", stop=mohs.attacks.Stop.BUDGET, seed=seed
                    ).x
                loss = nn.functional.cross_entropy(net.train()(a), b)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    return net.eval()


def run(options: Options) -> Iterator[str]:
    """One table over all nets, and what was said of whom."""
    data = load("bundled:fashion-mnist")
    x, y = data.x[HELD:], data.y[HELD:]
    yield "## The doctor on healthy nets"
    yield (
        f"{len(NETS) + len(ROBUST)} small nets, each trained here on {len(x)} of the bundled images, naturally or on PGD's points at "
        f"linf:{EPS}, and evaluated on the other {HELD} by the plan '{PLAN}'. A check that warns here raises a false alarm. 'Added': "
        "passes of attacks that checks asked for, as a share of the plan's, and what these broke; 'mended': the checks that asked "
        "and are quiet now."
    )
    rows, loud, total = [], Counter[str](), 0
    for robust, names in ((False, NETS), (True, ROBUST)):
        for seed, name in enumerate(names):
            net = trained(NETS[name], x, y, robust, seed)
            record = mohs.evaluate(net, (data.x[:HELD], data.y[:HELD]), f"linf:{EPS}", plan=PLAN, batch=64)
            findings, planned = (
                record.header.checks,
                sum(not step.note.startswith("added") for step in record.header.plan.steps),
            )
            total += len(findings)
            said = [f for f in findings if f.severity in ("warn", "block")]
            after = [f for f in findings if f.severity == "info" and ". Afterwards: " in f.saw]
            summaries = record.header.attacks
            passes = [
                sum(a.forwards + a.backwards for a in summaries if (a.index < planned) == own) for own in (True, False)
            ]
            broke = sum(a.broke for a in summaries if a.index >= planned)
            loud.update(f.severity for f in said)
            promise = next(f.saw for f in findings if f.id == "gradient-promise")
            accuracy = float((net(data.x[:HELD]).argmax(1) == data.y[:HELD]).double().mean())
            kept = promise.split("gains ")[1].split(" times")[0]
            rows.append(
                [
                    "PGD" if robust else "natural",
                    name,
                    f"{accuracy:.0%}",
                    kept,
                    f"{record.robust_accuracy:.1%}",
                    f"{passes[1] / passes[0]:.0%}, {broke} broken" if passes[1] else "",
                    ", ".join(f"{f.severity} {f.id}" for f in said),
                    ", ".join(f.id for f in after),
                ]
            )
    options.keep("doctor", [dict(zip(COLUMNS, row, strict=True)) for row in rows])
    yield table(COLUMNS, rows)
    yield (
        f"{len(rows)} nets, {total // len(rows)} checks each: {loud['block']} of {total} block, {loud['warn']} warn "
        f"({loud['warn'] / total:.1%})."
    )

"""What the row machine costs beyond the model's own passes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import mohs
from mohs.attacks import PGD, Stop

from .measure import Counted, alternate, ratios, replay, table
from .subjects import SEED, Options, images, small_net, wide_net

STEPS, EPS, STEP_SIZE = 40, 1e-3, 1e-4  # so small that hardly a row is decided by it; all are kept to the end anyway
HEAD = [
    "net",
    "rows",
    "batch",
    "passes",
    "mohs, s",
    "bare loop, s",
    "bare ms per pass",
    "ratio",
    "of minima",
    "bar",
    "held",
]


def run(options: Options) -> Iterator[str]:
    """PGD over a hand-written loop that makes exactly the same passes, all rows live for all steps."""
    yield "## Overhead over bare forward and input-backward passes"
    yield (
        f"PGD({STEPS}, step {STEP_SIZE:g}) at linf:{EPS:g} with `stop=Stop.BUDGET`, against a loop that replays the passes "
        "it made: same rows, same batches, same number, and nothing but `model(x)` and `torch.autograd.grad`. "
        "The ratio is taken round by round; 'of minima' sets our fastest run against its fastest, which a busy machine disturbs least."
    )
    x = images(options).x
    cases = [("small", small_net(), 512, 256, 1.15), ("wide", wide_net(), 64, 64, 1.05)]
    rows = []
    for name, net, count, batch, bar in cases:
        repeated = x[torch.arange(count) % len(x)]  # the batch size matters here, not how many images differ
        rows.append(_row(name, net, repeated, batch, bar, options.repeats))
    yield table(HEAD, rows)


def _row(name: str, net: nn.Module, x: Tensor, batch: int, bar: float, repeats: int) -> list[object]:
    with torch.no_grad():
        y = net(x).argmax(1)

    def ours(model: nn.Module = net) -> object:
        pgd = PGD(STEPS, STEP_SIZE)
        return mohs.attack(pgd, model, x, y, f"linf:{EPS}", batch=batch, seed=SEED, stop=Stop.BUDGET)

    counted = Counted(net)
    ours(counted)
    expected = -(-len(x) // batch) * ([[batch, 1]] * STEPS + [[batch, 0]])
    if sorted(counted.tape) != sorted(expected):
        raise RuntimeError(f"{name}: expected {len(expected)} passes of {batch} rows, got the tape {counted.tape}")
    replay(net, counted.tape, x)
    times = alternate({"ours": ours, "bare": lambda: replay(net, counted.tape, x)}, repeats)
    ratio = ratios(times["ours"], times["bare"])
    step = times["bare"].median / len(counted.tape) * 1e3
    fastest = min(times["ours"].seconds) / min(times["bare"].seconds)
    held = "yes" if ratio.median <= bar else "NO"
    return [
        name, len(x), batch, len(counted.tape), times["ours"], times["bare"], f"{step:.2f}", ratio, f"{fastest:.3f}", f"<= {bar}", held,
    ]  # fmt: skip

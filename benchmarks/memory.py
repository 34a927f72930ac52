"""Peak memory of attacks that look at many classes, on images of ImageNet's size: each in a process of its own."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import mohs
from mohs.attacks import REGISTRY

from .measure import table
from .minimum import with_steps
from .subjects import SEED, Options

CLASSES, BATCH, SIDE, STEPS = 1000, 16, 224, 2
ATTACKS = ("DeepFool", "FAB")
HEAD = ["attack", "peak of the whole process, MiB", "above one pass, MiB", "time, s"]


def run(options: Options) -> Iterator[str]:
    """Peaks of whole processes; the first line is what one forward and one backward of the batch need."""
    full = BATCH * (CLASSES - 1) * 3 * SIDE * SIDE * 4 / 2**20
    yield "## Memory"
    yield (
        f"{CLASSES} classes, {BATCH} images of 3 x {SIDE} x {SIDE}, a net of SqueezeNet's number of weights, {STEPS} steps, L2. "
        f"To hold the gradients of all classes at once would take {full:,.0f} MiB."
    )
    names = [name for name in options.attacks or ATTACKS if name in REGISTRY]
    rows: list[list[object]] = []
    base = 0.0
    for name in ("one pass", *names):
        start = time.perf_counter()
        peak = _child(name)
        base = base or peak
        rows.append([name, f"{peak:.0f}", f"{peak - base:.0f}", f"{time.perf_counter() - start:.1f}"])
    options.keep("memory", [dict(zip(HEAD, row, strict=True)) for row in rows])
    yield table(HEAD, rows)


def net() -> nn.Module:
    """1.2 million random weights, as SqueezeNet has; strides early, so that a pass takes little time."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=4, padding=3), nn.ReLU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(128, 256, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, stride=2, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, CLASSES),
        ).eval()  # fmt: skip


def _child(name: str) -> float:
    """Peak memory of a process that does this, in MiB."""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", name], check=True, cwd=root, capture_output=True, text=True
    )
    return float(done.stdout)


def _work(name: str) -> None:
    model = net()
    x = torch.rand(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(SEED))
    v = x.clone().requires_grad_(True)
    logits = model(v)
    torch.autograd.grad(logits.sum(), v)
    if name == "one pass":
        return
    attack = with_steps(REGISTRY[name], STEPS)
    mohs.attack(attack, model, x, logits.detach().argmax(1), "l2:inf", batch=BATCH, seed=SEED)


if __name__ == "__main__":
    _work(sys.argv[1])
    # kilobytes on Linux, bytes on macOS
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))

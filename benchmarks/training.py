"""Time per epoch of adversarial training, beside a loop by hand on torchattacks' PGD and beside ART's trainer."""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import mohs
from mohs.attacks import PGD
from mohs.data import Dataset, load
from mohs.defenses.training import Adam, Recipe, Saddle
from mohs.evaluation.training import train
from mohs.models.nets import small_cnn

from .measure import alternate, ratios, table
from .peers import missing
from .subjects import SEED, Options

EPS, STEPS, STEP_SIZE, BATCH, RATE = 0.1, 7, 0.025, 128, 2e-3
TESTED = 300
"""Images kept back from the epoch, to see what the trained nets are worth."""
RECIPE = Recipe(
    "epoch",
    "given",
    "small_cnn",
    Saddle(PGD(STEPS, STEP_SIZE)),
    1,
    f"linf:{EPS}",
    BATCH,
    Adam(lr=RATE),
    holdout=0,
    seed=SEED,
)


def run(options: Options) -> Iterator[str]:
    """Seconds of an epoch, ours over each peer's, and what low precision and layout give and cost."""
    yield "## Adversarial training: time per epoch"
    whole = load(options.data, n=options.rows + TESTED)
    data, rest = whole.take(len(whole) - TESTED), whole.take(indices=range(len(whole) - TESTED, len(whole)))
    yield (
        f"small_cnn, {len(data)} images, batches of {BATCH}, Adam, PGD of {STEPS} steps of {STEP_SIZE} from a random point at "
        f"linf:{EPS}, the last iterate trained on; "
        "ours with its checkpoint at the end of the epoch. 'by hand' is a loop around torch.autograd.grad."
    )
    runs: dict[str, Callable[[], nn.Module]] = {"mohs": lambda: ours(data), "by hand": lambda: loop(data, by_hand)}
    for name, make in (("torchattacks", torchattacks_loop), ("art", art_trainer)):
        if name in options.libraries and missing(name) is None:
            runs[name] = make(data)
    runs |= {
        "mohs, channels last": lambda: ours(data, layout=torch.channels_last),
        "mohs, bfloat16": lambda: ours(data, precision="bfloat16"),
    }
    for epoch in runs.values():
        epoch()
    times = alternate(runs, options.repeats)
    rows = []
    for name in runs:
        ratio = ratios(times["mohs"], times[name])
        rows.append([name, times[name], f"{ratio.median:.2f} ({min(ratio.seconds):.2f} to {max(ratio.seconds):.2f})"])
    options.keep("training", [dict(zip(("side", "seconds", "ratio"), map(str, row), strict=True)) for row in rows])
    yield table(["side", "seconds an epoch", "mohs over it"], rows)
    worth = []
    for name, epochs in (("mohs", ours), ("mohs, bfloat16", lambda d, **k: ours(d, precision="bfloat16", **k))):
        net = epochs(data, epochs=6)
        left = ~mohs.attack(PGD(40), net, rest.x, rest.y, f"linf:{EPS}").success
        worth.append([name, f"{_right(net, rest):.1%}", f"{float(left.double().mean()):.1%}"])
    yield table([f"after 6 epochs, {len(rest)} other images", "clean", "PGD, 40 steps"], worth)


def ours(
    data: Dataset, epochs: int = 1, layout: torch.memory_format | None = None, precision: str = "float32"
) -> nn.Module:
    """The recipe, in a directory that is thrown away."""
    recipe = replace(RECIPE, epochs=epochs, precision=precision)
    with tempfile.TemporaryDirectory() as out:
        if layout is None:
            return train(recipe, out=out, data=data, device="cpu").model
        return train(recipe, out=out, data=data, device="cpu", model=_net().to(memory_format=layout)).model


def loop(data: Dataset, perturb: Callable[[nn.Module], Any]) -> nn.Module:
    """One epoch as it is written by hand."""
    net = _net().train()
    points, optimiser = perturb(net), torch.optim.Adam(net.parameters(), lr=RATE)
    for at in torch.randperm(len(data), generator=torch.Generator().manual_seed(SEED)).split(BATCH):
        x, y = data.x[at], data.y[at]
        x = points(x, y)
        net.train()
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net


def by_hand(net: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """PGD with nothing around it."""

    def points(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        net.eval()
        moved = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
        for _ in range(STEPS):
            moved.requires_grad_(True)
            (slope,) = torch.autograd.grad(nn.functional.cross_entropy(net(moved), y), moved)
            moved = moved.detach() + STEP_SIZE * slope.sign()
            moved = (x + (moved - x).clamp(-EPS, EPS)).clamp(0, 1)
        return moved

    return points


def torchattacks_loop(data: Dataset) -> Callable[[], nn.Module]:
    """The same loop around torchattacks' PGD."""
    library = importlib.import_module("torchattacks")
    return lambda: loop(data, lambda net: library.PGD(net, eps=EPS, alpha=STEP_SIZE, steps=STEPS, random_start=True))


def art_trainer(data: Dataset) -> Callable[[], nn.Module]:
    """ART's trainer after Madry, all points adversarial."""
    trainers = importlib.import_module("art.defences.trainer")
    estimators = importlib.import_module("art.estimators.classification")
    x, y = data.x.numpy(), nn.functional.one_hot(data.y, 10).float().numpy()

    def epoch() -> nn.Module:
        net = _net()
        estimator = estimators.PyTorchClassifier(
            net, nn.CrossEntropyLoss(), tuple(data.x.shape[1:]), 10, optimizer=torch.optim.Adam(net.parameters(), lr=RATE),
            clip_values=(0, 1), device_type="cpu",
        )  # fmt: skip
        trainer = trainers.AdversarialTrainerMadryPGD(
            estimator, nb_epochs=1, batch_size=BATCH, eps=EPS, eps_step=STEP_SIZE, max_iter=STEPS, num_random_init=1
        )
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            trainer.fit(x, y)
        return net

    return epoch


def _net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return small_cnn()


def _right(net: nn.Module, data: Dataset) -> float:
    with torch.no_grad():
        return float((net(data.x).argmax(1) == data.y).double().mean())

"""``mohs train``: a recipe, a bar, checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mohs.cli import screen

if TYPE_CHECKING:
    from mohs.defenses.training import Progress as Told


def train_recipe(recipe: str, out: Path, resume: bool, data: str | None, epochs: int | None, seed: int | None) -> int:
    """Train by a recipe and say where the weights lie."""
    from dataclasses import replace

    from mohs.evaluation.training import load_recipe, train

    chosen = load_recipe(recipe)
    changed: dict[str, Any] = {k: v for k, v in (("data", data), ("epochs", epochs), ("seed", seed)) if v is not None}
    chosen = replace(chosen, **changed)
    first = os.environ.get("RANK", "0") == "0"  # under torchrun one process speaks for all
    if first:
        screen.say(f"{chosen!r}\n")
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=28), MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"), TimeRemainingColumn(), console=screen.err, transient=True,
        disable=not first,
    )  # fmt: skip
    task = bars.add_task(chosen.name, total=None, note="")

    def told(p: Told) -> None:
        done = (p.epoch - 1) * p.steps + p.step
        bars.update(task, completed=done, total=p.epochs * p.steps, note=f"loss {p.loss:.4f}")
        if p.row is not None and first:
            screen.say("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in p.row.items()))
        if p.warning is not None and first:
            screen.err.print(f"warning: {p.warning}", style="yellow")

    with bars:
        trained = train(chosen, out=out, resume=resume, progress=told)
    if not first:
        return 0
    screen.say(f"\nDone in {trained.seconds:.0f} s. Weights: {trained.weights}")
    screen.next_steps(
        [f"mohs run {trained.weights} DATA --threat linf:0.1 --claim 'accuracy >= 0.5' --out runs/{chosen.name}"]
    )
    return 0

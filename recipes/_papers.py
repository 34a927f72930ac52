"""What the recipes that rebuild a paper share: its data and nets, its statements, and tables."""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mohs.data import Dataset, load
from mohs.defenses.training import Progress, Recipe
from mohs.evaluation.training import train
from mohs.records.stats import clopper_pearson

FASHION = "idx:/usr/share/datasets/fashion-mnist"
"""Debian's package dataset-fashion-mnist; ``--data idx:FOLDER`` takes MNIST's four files where you have them."""


@dataclass
class Paper:
    """A run of a recipe: its data, where it writes, and what it found."""

    given: argparse.Namespace
    statements: list[tuple[str, bool, str]] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    def parse(cls, about: str | None, **more: tuple[Any, str]) -> Paper:
        """From the command line; ``more``: further options by name, each with its default and its help."""
        parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
        parser.add_argument("--data", default=FASHION, help="where the images are, as mohs.data.load takes it")
        parser.add_argument(
            "--out", type=Path, default=Path("runs/papers"), help="folder for nets, figures and results"
        )
        parser.add_argument("--full", action="store_true", help="the published size: hours, or a GPU")
        parser.add_argument("--device", default="cpu")
        for name, (default, text) in more.items():
            parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
        return cls(parser.parse_args())

    @property
    def full(self) -> bool:
        """At the published size?"""
        return bool(self.given.full)

    def data(self, split: str, n: int) -> Dataset:
        """The first ``n`` images of a split."""
        found = load(self.given.data, split=split, n=n)
        return Dataset(found.x.to(self.given.device), found.y.to(self.given.device))

    def trained(self, recipe: Recipe, data: Dataset) -> nn.Module:
        """The recipe's net, trained on these data: now, or where an earlier run left it."""
        folder = self.given.out / "nets" / f"{recipe.name}-{recipe.identity[:8]}-{data.hash[:8]}"
        return train(recipe, out=folder, data=data, device=self.given.device).model.eval().requires_grad_(False)

    def each_epoch(self, recipe: Recipe, data: Dataset, net: nn.Module) -> list[nn.Module]:
        """Train a copy of the net; it after each epoch."""
        model, nets = copy.deepcopy(net).requires_grad_(True), []

        def keep(progress: Progress) -> None:
            if progress.row is not None:
                nets.append(copy.deepcopy(model).eval().requires_grad_(False))

        folder = self.given.out / "nets" / f"{recipe.name}-{recipe.identity[:8]}"
        train(recipe, out=folder, data=data, model=model, device=self.given.device, resume=False, progress=keep)
        return nets

    def state(self, text: str, holds: bool, figure: str) -> None:
        """One statement of the paper, and whether it holds here."""
        self.statements.append((text, holds, figure))
        print(f"{'holds here' if holds else 'FAILS HERE'}: {text} ({figure})", flush=True)

    def table(self, title: str, rows: Sequence[dict[str, Any]]) -> None:
        """Print a table, and keep it."""
        self.tables[title] = list(rows)
        columns = list(dict.fromkeys(key for row in rows for key in row))
        print(f"\n## {title}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
        for row in rows:
            print("| " + " | ".join(shown(row.get(column, "-")) for column in columns) + " |")
        print(flush=True)

    def end(self, name: str) -> None:
        """Write everything down, and say how much of the paper holds here."""
        seconds = time.perf_counter() - self.began
        self.given.out.mkdir(parents=True, exist_ok=True)
        found = {"statements": self.statements, "tables": self.tables, "seconds": seconds}
        (self.given.out / f"{name}.json").write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
        held = sum(holds for _, holds, _ in self.statements)
        print(f"\n{held} of {len(self.statements)} statements hold here; {seconds:.0f} s.")


def shown(value: Any) -> str:
    """A cell: shares as percent with their interval, other numbers with three digits."""
    if isinstance(value, Share):
        return str(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Share:
    """Hits of n, with the 95% interval of Clopper and Pearson."""

    hits: int
    n: int

    @classmethod
    def of(cls, flags: Tensor) -> Share:
        """How many of these flags are set."""
        return cls(int(flags.sum()), len(flags))

    @property
    def value(self) -> float:
        """The share."""
        return self.hits / max(self.n, 1)

    @property
    def interval(self) -> tuple[float, float]:
        """Two-sided, 95%."""
        return clopper_pearson(self.hits, self.n, 0.05)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} ({low:.1%} to {high:.1%})"


def right(model: nn.Module, data: Dataset) -> Tensor:
    """Which images the model answers as labelled, [N]."""
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in data.x.split(1000)]) == data.y


def mean_and_error(values: Iterable[float] | Tensor) -> tuple[float, float]:
    """The mean, and half of its 95% interval by the normal approximation."""
    found = torch.as_tensor(values if isinstance(values, Tensor) else list(values)).double()
    return float(found.mean()), 1.96 * float(found.std(correction=1)) / max(len(found), 1) ** 0.5

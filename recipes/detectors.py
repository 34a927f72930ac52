"""Detectors under an attack that ignores them, and under one that knows them: areas, rates, and what is left.

    python recipes/detectors.py                       # all detectors, 1,000 images, prints the table
    python recipes/detectors.py --only lid --rows 200 --figures runs/detectors

Each detector stands before the bundled net for Fashion-MNIST that knows no adversary, as recipes/breaks.py fits it, at Linf 0.1. Two
columns for each figure: 'ignored' is PGD, 40 steps of cross-entropy, on the classifier alone, as most papers of detectors tested them
(the points are transferred to the detector); 'joint' is the strongest for each image of WeightedPGD and OrthogonalPGD, which know
classifier and detector.

    fooled      share of all images whose attacked version the classifier answers wrongly, flagged or not; the next three are of these
    area        area under the ROC of the detector's score, clean images against these
    at 1%, 5%   share of these that is flagged where 1% (5%) of clean images is
    accuracy    right and not rejected: of clean images; 'ignored': right or rejected under attack; 'standard': under Mohs's plan
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _detectors import DETECTORS, THREAT
from _figures import pyplot, save
from breaks import Classes, natural
from torch import Tensor, nn

import mohs
from mohs.attacks import PGD, OrthogonalPGD, Stop, WeightedPGD
from mohs.data import Dataset, load
from mohs.defenses._detector import Detector
from mohs.evaluation import ROC
from mohs.objectives import plain_cross_entropy
from mohs.records.stats import clopper_pearson

RATES = (0.01, 0.05)


def measure(model: nn.Module, data: Dataset, plan: str | None) -> dict[str, Any]:
    """One row of the table, and both curves."""
    detector = model.defense
    assert isinstance(detector, Detector)
    reject = model(data.x[:1]).shape[1] - 1
    clean = answers(model, data.x)
    scores = detector.scores(model, data.x)
    row: dict[str, Any] = {
        "clean": share(clean == data.y),
        "flagged clean": share(clean == reject),
    }
    for name, points in {"ignored": ignored(model, data), "joint": joint(model, data, reject)}.items():
        wrong = answers(Classes(model).eval(), points) != data.y
        row[f"{name}: fooled"] = share(wrong)
        answer = answers(model, points)
        row[f"{name}: accuracy"] = share((answer == data.y) | ((answer == reject) & (clean == data.y)))
        if bool(wrong.any()):
            roc = ROC(scores, detector.scores(model, points[wrong]))
            row[f"{name}: area"] = (roc.auc, *roc.interval())
            row |= {f"{name}: at {fpr:.0%}": roc.rate(fpr) for fpr in RATES}
            row[f"{name}: curve"] = [values.tolist() for values in roc.curve()]
    if plan:
        record = mohs.evaluate(model, data, THREAT, plan=plan, control=0)
        row[plan] = (record.robust_accuracy, *record.interval())
    return row


def answers(model: nn.Module, x: Tensor) -> Tensor:
    """The class of each input, or the number of the rejection."""
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in x.split(256)])


def ignored(model: nn.Module, data: Dataset) -> Tensor:
    """Points of an attack that sees the classifier alone."""
    attack = PGD(steps=40, objective=plain_cross_entropy)
    return mohs.attack(attack, Classes(model).eval(), data.x, data.y, THREAT, stop=Stop.BUDGET).x


def joint(model: nn.Module, data: Dataset, reject: int) -> Tensor:
    """For each image the better of two attacks on classifier and detector; they go on after their first success."""
    guide = mohs.defenses.declared(model).guide
    found = [
        mohs.attack(attack, model, data.x, data.y, THREAT, stop=Stop.BUDGET, guide=guide, reject=reject)
        for attack in (WeightedPGD(steps=200), OrthogonalPGD(steps=200))
    ]
    best = (found[1].margin > found[0].margin).view(-1, *[1] * (data.x.dim() - 1))
    return torch.where(best, found[1].x, found[0].x)


def share(flags: Tensor) -> tuple[float, float, float]:
    """Of all, with its 95% interval."""
    hits, n = int(flags.sum()), len(flags)
    return hits / n, *clopper_pearson(hits, n, 0.05)


def said(value: Any, percent: bool = True) -> str:
    """A figure and its interval."""
    if value is None:
        return "-"
    middle, low, high = value
    return f"{middle:.1%} ({low:.0%} to {high:.0%})" if percent else f"{middle:.3f} ({low:.2f} to {high:.2f})"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "clean": lambda row: said(row["clean"]),
    "flagged clean": lambda row: said(row["flagged clean"]),
    **{
        f"{name}: {what}": (lambda key, percent: lambda row: said(row.get(key), percent))(f"{name}: {what}", what != "area")
        for what in ("fooled", "area", "at 1%", "at 5%", "accuracy")
        for name in ("ignored", "joint")
    },
}  # fmt: skip


def draw(rows: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """One panel for each detector, both curves in it."""
    plt = pyplot()
    figure, axes = plt.subplots(2, (len(rows) + 1) // 2, figsize=(2.4 * ((len(rows) + 1) // 2), 6.4), squeeze=False)
    for axis in axes.flat[len(rows) :]:
        axis.set_visible(False)
    for axis, (name, row) in zip(axes.flat, rows.items()):
        for attack in ("ignored", "joint"):
            if curve := row.get(f"{attack}: curve"):
                axis.plot(*curve, label=f"{attack}: {row[f'{attack}: area'][0]:.2f}")
        axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=name, xlabel="clean flagged", ylabel="attacked flagged", aspect="equal")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), title="area")
    return save(figure, folder, "detectors")


def main() -> None:
    """Print the table; rows appear as they are ready."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--plan", default="standard", help="also evaluate with this plan; '' leaves it out")
    parser.add_argument("--only", action="append", choices=DETECTORS, help="a detector")
    parser.add_argument("--figures", type=Path, help="a folder for the curves, as SVG and PNG")
    parser.add_argument("--out", type=Path, help="the rows as JSON")
    given = parser.parse_args()
    data, rows = load("bundled:fashion-mnist", n=given.rows), {}
    columns = COLUMNS | ({given.plan: lambda row: said(row[given.plan])} if given.plan else {})
    print("| detector | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    for name in given.only or DETECTORS:
        rows[name] = measure(DETECTORS[name](natural()), data, given.plan)
        print(f"| {name} | " + " | ".join(column(rows[name]) for column in columns.values()) + " |", flush=True)
        if given.out:
            given.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if given.figures:
        print(*draw(rows, given.figures))


if __name__ == "__main__":
    main()

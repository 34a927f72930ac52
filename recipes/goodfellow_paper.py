"""Goodfellow, Shlens, Szegedy, "Explaining and harnessing adversarial examples" (ICLR 2015), and the debate that followed.

    python recipes/goodfellow_paper.py                            # Fashion-MNIST at Linf 0.1, minutes
    python recipes/goodfellow_paper.py --data idx:FOLDER --full   # MNIST's files at Linf 0.25, longer trainings

The mixture of clean and FGSM losses, its error clean and under FGSM before and after; and what became of it: the nets trained on FGSM,
on FGSM's points of other nets (ensemble adversarial training), and on PGD, under one step, one step after a random one,
many steps, and points transferred from a net of their own. A net whose gradients were masked by its training looks
robust to one step of its own, and is broken by one step of another net.

Measured on Fashion-MNIST at Linf 0.1 (10,000 training images, eight epochs, 1,000 test images; percent, intervals about 3 points):

    trained               clean   FGSM   random, FGSM   PGD-40   APGD-100   transferred FGSM / PGD-40
    natural                85.8    8.4            8.1      3.4        3.4        23.7 / 21.3
    mixture, half FGSM     84.2   66.0           65.1     58.7       55.6        74.1 / 74.8
    FGSM alone             78.8   66.8           66.2     60.8       58.1        73.2 / 73.9
    ensemble, half FGSM    82.6   53.5           53.0     46.2       44.3        74.3 / 74.8
    PGD, 7 steps           78.9   67.6           67.6     65.8       64.8        73.7 / 74.1

At this radius a net so small does not learn to mask its gradients: trained on one step it loses six points to forty, not most, and
fools itself more than another net does. So the statements about masking fail here; the order under strong attacks is theirs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from _papers import Paper, Share, right
from torch import nn

import mohs
from mohs.attacks import APGD, FGSM, PGD
from mohs.data import Dataset
from mohs.defenses.training import Adam, Ensemble, Mixture, Natural, Recipe, Saddle
from mohs.objectives import plain_cross_entropy

PUBLISHED = {"error under FGSM": "89.4% before, 17.9% after", "error clean": "0.94% before, 0.84% after"}
"""A maxout net on MNIST, Linf 0.25."""
ONE = FGSM(objective=plain_cross_entropy)
ATTACKS: dict[str, Any] = {
    "FGSM": ONE,
    "random, then FGSM": PGD(steps=1, objective=plain_cross_entropy),
    "PGD, 40 steps": PGD(steps=40, objective=plain_cross_entropy),
    "APGD, 100 steps": APGD(steps=100),
}


def accuracy(net: nn.Module, data: Dataset, attack: Any, threat: str) -> Share:
    """Who is right and survives the attack."""
    out = mohs.attack(attack, net, data.x, data.y, threat)
    return Share.of(~out.success & right(net, data))


def transferred(source: nn.Module, net: nn.Module, data: Dataset, attack: Any, threat: str) -> Share:
    """Who is right at the points that were made on another net."""
    points = mohs.attack(attack, source, data.x, data.y, threat, stop=mohs.Stop.BUDGET).x
    return Share.of(right(net, Dataset(points, data.y)))


def main() -> None:
    """Both tables, and the statements."""
    paper = Paper.parse(
        __doc__,
        n=(1000, "test images"),
        train=(10_000, "training images"),
        epochs=(8, "of each training"),
        threat=("", "instead of linf:0.1, and of linf:0.25 with --full"),
    )
    threat = paper.given.threat or ("linf:0.25" if paper.full else "linf:0.1")
    data = paper.data("train", 60_000 if paper.full else paper.given.train)
    test = paper.data("test", 10_000 if paper.full else paper.given.n)
    recipe = Recipe(
        "goodfellow", paper.given.data, "small_cnn", Natural(), epochs=50 if paper.full else paper.given.epochs,
        optimiser=Adam(lr=2e-3), holdout=0,
    )  # fmt: skip

    def made(objective: Any, seed: int = 0, net: str = "small_cnn") -> nn.Module:
        attacked = None if isinstance(objective, Natural) else threat
        return paper.trained(replace(recipe, objective=objective, threat=attacked, seed=seed, net=net), data)

    others = [made(Natural(), seed=1), made(Natural(), seed=2, net="lenet")]
    nets = {
        "natural": made(Natural()),
        "mixture, half FGSM": made(Mixture(ONE)),
        "FGSM alone": made(Saddle(ONE)),
        "ensemble, half FGSM": made(Ensemble(Mixture(ONE), tuple(others))),
        "PGD, 7 steps": made(Saddle(PGD(steps=7))),
    }
    source = made(Natural(), seed=3)  # a net that nobody was trained against
    rows = []
    for name, net in nets.items():
        row: dict[str, Any] = {"trained": name, "clean": Share.of(right(net, test))}
        row |= {title: accuracy(net, test, attack, threat) for title, attack in ATTACKS.items()}
        row |= {
            f"transferred {title}": transferred(source, net, test, ATTACKS[title], threat)
            for title in ("FGSM", "PGD, 40 steps")
        }
        rows.append(row)
    paper.table(f"Accuracy at {threat}", rows)
    statements(paper, {row["trained"]: row for row in rows})
    paper.end("goodfellow")


def statements(paper: Paper, rows: dict[str, dict[str, Any]]) -> None:
    """What the papers say."""
    bare, mixed, alone, several, saddle = rows.values()

    def errors(key: str) -> str:
        return f"{1 - bare[key].value:.1%} before, {1 - mixed[key].value:.1%} after"

    paper.state(
        f"Goodfellow: the mixture makes errors under FGSM rare (published: {PUBLISHED['error under FGSM']})",
        1 - mixed["FGSM"].value < 0.5 * (1 - bare["FGSM"].value), errors("FGSM"),
    )  # fmt: skip
    paper.state(
        f"Goodfellow: and costs no clean accuracy (published: {PUBLISHED['error clean']})",
        mixed["clean"].value >= bare["clean"].value - 0.01, errors("clean"),
    )  # fmt: skip
    low = alone["PGD, 40 steps"].value
    paper.state("Madry: training on FGSM alone does not withstand many steps", low < 0.5 * alone["FGSM"].value,
                f"{alone['FGSM']} under FGSM, {alone['PGD, 40 steps']} under PGD")  # fmt: skip
    gap = alone["FGSM"].value - alone["transferred FGSM"].value
    paper.state("Tramer: a net trained on FGSM is weaker to one step of another net than to its own", gap > 0,
                f"{alone['FGSM']} own, {alone['transferred FGSM']} of another net")  # fmt: skip
    gap = alone["FGSM"].value - alone["random, then FGSM"].value
    paper.state("Tramer: and weaker to a random step followed by one of half the length", gap > 0,
                f"{alone['FGSM']} and {alone['random, then FGSM']}")  # fmt: skip
    better = several["transferred PGD, 40 steps"].value > alone["transferred PGD, 40 steps"].value
    paper.state("Tramer: ensemble training withstands transferred points better", better,
                f"{several['transferred PGD, 40 steps']} and {alone['transferred PGD, 40 steps']}")  # fmt: skip
    low = several["APGD, 100 steps"].value
    paper.state(
        "Athalye: but not an attack on itself",
        low < 0.5 * several["transferred PGD, 40 steps"].value,
        str(several["APGD, 100 steps"]),
    )
    best = max((row["APGD, 100 steps"] for row in rows.values() if row is not saddle), key=lambda share: share.value)
    clear = saddle["APGD, 100 steps"].interval[0] > best.interval[1]
    paper.state("Madry: training on PGD does, beyond chance better than all others", clear,
                f"{saddle['APGD, 100 steps']}, the others at most {best}")  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

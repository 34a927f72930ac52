"""Every defense that is trained and every detector, on one architecture and the same images: who stands, and who falls.

    python recipes/defenses.py                        # all rows, 1,000 images; not yet measured
    python recipes/defenses.py --only TRADES --n 200

The net is small_cnn, trained on 10,000 images for eight epochs; detectors stand before the net trained naturally. Linf 0.1.
Columns, accuracies on the first 1,000 test images with 95% intervals (of a detector: right and not rejected when clean; under attack
right, or rejected):

    clean      without an attack
    naive      PGD, 40 steps of the cross-entropy, with the model's own gradients; a detector's rejections are ignored by the attack
    transfer   points of the same PGD on a net of another seed, trained naturally
    adaptive   Mohs's plan 'standard', which knows the model, its defense and its detector
    expected   stands or falls, as the literature has it, written down before the run; and whether it did: to fall is to keep at most 10
               points more than the natural net under 'adaptive', to stand is to keep at least half of the clean accuracy
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from _detectors import DETECTORS
from _papers import Paper, Share, right
from torch import Tensor, nn

import mohs
from mohs import defenses
from mohs.attacks import BIM, FGSM, PGD, DeepFool, Stop
from mohs.data import Dataset
from mohs.defenses.training import (
    AWP,
    MART,
    NFGSM,
    TRADES,
    VAT,
    Adam,
    Cascade,
    Constant,
    Cosine,
    DeepContractive,
    Ensemble,
    Fast,
    FineTune,
    Free,
    GaussianAugmentation,
    GradAlign,
    Mixture,
    Natural,
    Recipe,
    Saddle,
    UnifiedEmbedding,
)
from mohs.evaluation.training import distil, train
from mohs.objectives import plain_cross_entropy

THREAT = "linf:0.1"
NAIVE = PGD(steps=40, objective=plain_cross_entropy)
STANDS, FALLS, BETWEEN = "stands", "falls", "-"
Make = Callable[["Nets"], nn.Module]
BROKEN = {
    "lid": "5 (Athalye; CIFAR-10, Linf 0.031)", "magnet": "0 (Carlini and Wagner; CIFAR-10, L2 0.5)",
    "trapdoor": "area .02 (Carlini)", "feature-squeezing": "broken (He)", "binary-detector": "broken (Carlini and Wagner)",
    "pca-whitening": "broken (Carlini and Wagner)",
}  # fmt: skip
"""Of the detectors, what others reported of them."""
MARGIN = 0.1
"""By so much more than the natural net a defense that falls may keep."""


class Nets:
    """The nets of the table; each is trained when it is asked for, or found where an earlier run left it."""

    def __init__(self, paper: Paper, images: int, epochs: int) -> None:
        self.paper, self.data = paper, paper.data("train", images)
        self.plan = Recipe(
            "defenses", paper.given.data, "small_cnn", Natural(), epochs, optimiser=Adam(lr=2e-3), schedule=Cosine(rise=0.02),
            holdout=0,
        )  # fmt: skip

    def by(self, objective: Any, **other: Any) -> nn.Module:
        """A net trained with this objective; an attacked one with a radius that grows over the first quarter."""
        if not isinstance(objective, Natural | GaussianAugmentation | DeepContractive):
            other = {"threat": THREAT, "warmup": self.plan.epochs / 4} | other
        return self.paper.trained(replace(self.plan, objective=objective, **other), self.data)

    def natural(self, seed: int = 0, net: str = "small_cnn") -> nn.Module:
        """The net without a defense."""
        return self.by(Natural(), seed=seed, net=net)

    def distilled(self, temperature: float) -> nn.Module:
        """The student."""
        plan = replace(self.plan, name=f"distilled-{temperature:g}", objective=Natural(temperature=temperature))
        out = self.paper.given.out / "nets" / f"{plan.name}-{plan.identity[:8]}-{self.data.hash[:8]}"
        found = distil(plan, out=out, data=self.data, device=self.paper.given.device)
        return found.student.model.eval().requires_grad_(False)

    def bounded(self) -> nn.Module:
        """Trained on noise, with activations that stop at 1."""
        plan = replace(self.plan, name="bounded", objective=GaussianAugmentation(0.3))
        with torch.random.fork_rng():
            torch.manual_seed(plan.seed)
            model = defenses.BoundedReLU(1.0)(plan.build_net())
        out = self.paper.given.out / "nets" / f"{plan.name}-{plan.identity[:8]}-{self.data.hash[:8]}"
        found = train(plan, out=out, data=self.data, model=model, device=self.paper.given.device)
        return found.model.eval().requires_grad_(False)

    def tuned(self) -> nn.Module:
        """Five more epochs on DeepFool's points of the natural net, at half of the rate."""
        tuning = {"threat": "l2:inf", "warmup": 0.0, "epochs": 5, "optimiser": Adam(lr=1e-3), "schedule": Constant()}
        return self.by(FineTune(DeepFool()), start=self.natural(), seed=1, **tuning)

    def cascade(self) -> nn.Module:
        """Against a net that was trained so before."""
        way = UnifiedEmbedding(FGSM())
        return self.by(Cascade(way, BIM(steps=10), self.by(way)), seed=1)


ROWS: dict[str, tuple[Make, str, str]] = {
    "no defense": (lambda nets: nets.natural(), FALLS, ""),
    "smoothness penalty": (lambda nets: nets.by(DeepContractive()), FALLS, ""),
    "noise and bounded ReLU": (lambda nets: nets.bounded(), FALLS, ""),
    "virtual adversarial": (lambda nets: nets.by(VAT(), threat="l2:1", warmup=0.0), BETWEEN, ""),
    "distilled at T = 20": (lambda nets: nets.distilled(20.0), FALLS, "4 (Carlini and Wagner; MNIST, L0 112)"),
    "tuned on DeepFool's points": (lambda nets: nets.tuned(), FALLS, ""),
    "pruned by 80%": (lambda nets: defenses.WeightPruning(0.8)(nets.natural()).eval(), FALLS, ""),
    "weights of 4 bits": (lambda nets: defenses.Quantisation(4)(nets.natural()).eval(), FALLS, ""),
    "mixture with FGSM": (lambda nets: nets.by(Mixture(FGSM())), BETWEEN, "82 under FGSM (Goodfellow; MNIST, Linf 0.25)"),
    "ensemble training": (
        lambda nets: nets.by(Ensemble(Mixture(FGSM()), (nets.natural(1), nets.natural(2, "lenet")))), BETWEEN, "",
    ),
    "cascade": (lambda nets: nets.cascade(), BETWEEN, "15 (Athalye; CIFAR-10, Linf 0.015)"),
    "fast": (lambda nets: nets.by(Fast()), STANDS, "89 under PGD (Wong; MNIST, Linf 0.3)"),
    "N-FGSM": (lambda nets: nets.by(NFGSM()), STANDS, ""),
    "free": (lambda nets: nets.by(Free(4)), STANDS, ""),
    "FGSM with GradAlign": (lambda nets: nets.by(GradAlign(Saddle(FGSM()))), STANDS, ""),
    "PGD": (lambda nets: nets.by(Saddle(PGD(steps=5))), STANDS, "89 under PGD 100 x 20 (Madry; MNIST, Linf 0.3)"),
    "PGD with AWP": (lambda nets: nets.by(AWP(Saddle(PGD(steps=5)))), STANDS, ""),
    "TRADES": (lambda nets: nets.by(TRADES(steps=5)), STANDS, "96 under PGD-40 (Zhang; MNIST, Linf 0.3)"),
    "MART": (lambda nets: nets.by(MART(PGD(steps=5))), STANDS, ""),
    **{name: (lambda nets, fit=fit: fit(nets.natural()), FALLS, BROKEN.get(name, "")) for name, fit in DETECTORS.items()},
}  # fmt: skip
"""How each model is made, whether it is expected to stand, and what was published, in percent."""


class Classes(nn.Module):
    """The logits of the classes, without that of the rejection."""

    def __init__(self, model: nn.Module, classes: int = 10) -> None:
        super().__init__()
        self.model, self.classes = model, classes
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[:, : self.classes]


def held(model: nn.Module, data: Dataset, points: Tensor, clean: Tensor) -> Share:
    """Who is right at these points, or rejected there (class 10), of those who are right when clean."""
    answers = torch.cat([model(part).argmax(1) for part in points.split(250)])
    return Share.of(clean & ((answers == data.y) | (answers == 10)))


def row(name: str, nets: Nets, test: Dataset, plan: str) -> dict[str, Any]:
    """One model, attacked in three ways."""
    make, expected, published = ROWS[name]
    model, source = make(nets), nets.natural(9)
    clean = right(model, test)
    naive = mohs.attack(NAIVE, Classes(model), test.x, test.y, THREAT, stop=Stop.BUDGET).x
    moved = mohs.attack(NAIVE, source, test.x, test.y, THREAT, stop=Stop.BUDGET).x
    record = mohs.evaluate(model, test, THREAT, plan=plan, control=0)
    return {
        "defense": name, "clean": Share.of(clean), "naive": held(model, test, naive, clean),
        "transfer": held(model, test, moved, clean), "adaptive": Share.of(torch.as_tensor(record.survived)),
        "expected": expected, "published": published,
    }  # fmt: skip


def outcome(found: dict[str, Any], bare: float) -> bool | None:
    """Did the row do what is expected of it? None: nothing is."""
    if found["expected"] == FALLS:
        return bool(found["adaptive"].value <= bare + MARGIN)
    return bool(found["adaptive"].value >= found["clean"].value / 2) if found["expected"] == STANDS else None


def main() -> None:
    """Print the rows as they are ready, then the table and what was expected."""
    paper = Paper.parse(
        __doc__, n=(1000, "test images"), train=(10_000, "training images"), epochs=(8, "of each training"), only=("", "one row"),
        plan=("standard", "the plan of the last column"),
    )  # fmt: skip
    nets, test = Nets(paper, paper.given.train, paper.given.epochs), paper.data("test", paper.given.n)
    rows: list[dict[str, Any]] = []
    for name in ["no defense", paper.given.only] if paper.given.only else ROWS:
        rows.append(row(name, nets, test, paper.given.plan))
        print(" | ".join(f"{value}" for value in rows[-1].values()), flush=True)
    paper.table(f"Accuracy at {THREAT}", rows)
    for found in rows[1:]:
        held = outcome(found, rows[0]["adaptive"].value)
        if held is not None:
            paper.state(
                f"{found['defense']} {found['expected']}", held, f"{found['clean']} clean, {found['adaptive']} left"
            )
    paper.end("defenses")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

"""Papernot, McDaniel, Wu, Jha, Swami, "Distillation as a defense to adversarial perturbations" (S&P 2016), and how it fell.

    python recipes/distillation_paper.py                            # Fashion-MNIST, a small net, minutes
    python recipes/distillation_paper.py --data idx:FOLDER --full   # MNIST's files, all temperatures, more of everything

For each temperature T a teacher and its student are trained, and the student is attacked at T = 1 with JSMA on its softmax, as in the
paper: pixels are raised in pairs, at most 112 of them, towards each of the nine other classes. Beside it stands what
Carlini and Wagner showed: the same attack on the logits does not notice the defense.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from _figures import pyplot, save
from _papers import Paper, Share, mean_and_error, right
from torch import Tensor, nn

import mohs
from mohs.attacks import APGD, JSMA
from mohs.data import Dataset
from mohs.defenses.training import Adam, Natural, Recipe
from mohs.evaluation.training import distil

TEMPERATURES = (1, 2, 5, 10, 20, 30, 40, 50, 100)
FEW = (1, 5, 20, 100)
FEATURES = 112
"""Pixels that may change: a seventh of the image."""
PAPERS = JSMA(steps=FEATURES // 2, all_rivals=True, decrease=False, polish=0)
PUBLISHED = {"undistilled": "95.89%", "distilled": "0.45%"}
"""Success of JSMA on MNIST without distillation and at T = 100."""


class Softmax(nn.Module):
    """A model's probabilities instead of its logits, as it is deployed."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(1)


def targeted(model: nn.Module, data: Dataset, attack: Any = PAPERS) -> tuple[Tensor, Tensor]:
    """Towards every other class: success [N * 9], and the share of changed pixels where it succeeded."""
    won, sizes = [], []
    for label in range(10):
        rows = data.y != label
        out = mohs.attack(
            attack, model, data.x[rows], data.y[rows], f"l0:{FEATURES}", targets=torch.full_like(data.y[rows], label)
        )
        won.append(out.success)
        sizes.append(out.size[out.success] / data.x[0].numel())
    return torch.cat(won), torch.cat(sizes)


def amplitude(model: nn.Module, x: Tensor) -> Tensor:
    """Mean absolute derivative of the class probabilities by the pixels, averaged over classes, [N]."""
    x = x.clone().requires_grad_(True)
    probabilities = model(x).softmax(1)
    parts = [
        torch.autograd.grad(probabilities[:, k].sum(), x, retain_graph=True)[0] for k in range(probabilities.shape[1])
    ]
    return torch.stack(parts).abs().flatten(2).mean((0, 2))


def row(name: str, net: nn.Module, test: Dataset, few: Dataset, radius: str) -> dict[str, Any]:
    """What one net is worth."""
    won, sizes = targeted(Softmax(net), few)
    logits, _ = targeted(net, few)
    slopes = amplitude(net, test.x)
    apgd = mohs.attack(APGD(steps=50), net, test.x, test.y, radius)
    return {
        "T": name, "accuracy": Share.of(right(net, test)), "JSMA on softmax": Share.of(won),
        "changed pixels": mean_and_error(sizes)[0] if len(sizes) else float("nan"), "JSMA on logits": Share.of(logits),
        "mean gradient": float(slopes.mean()), "gradients below 1e-10": Share.of(slopes < 1e-10),
        f"accuracy under APGD, {radius}": Share.of(~apgd.success),
    }  # fmt: skip


def main() -> None:
    """The table over T, the statements, the figures."""
    paper = Paper.parse(
        __doc__, n=(40, "images that JSMA attacks"), train=(10_000, "training images"), epochs=(30, "of each training")
    )
    temperatures = TEMPERATURES if paper.full else FEW
    data = paper.data("train", 60_000 if paper.full else paper.given.train)
    test = paper.data("test", 1000)
    few, radius = test.take(1000 if paper.full else paper.given.n), "linf:0.1"
    recipe = Recipe(
        "distillation", paper.given.data, "small_cnn", Natural(), epochs=50 if paper.full else paper.given.epochs,
        optimiser=Adam(lr=2e-3), holdout=0,
    )  # fmt: skip
    rows = [row("undistilled", paper.trained(recipe, data), test, few, radius)]
    for temperature in temperatures:
        # the gradient falls with T, and Adam's steps do not
        plan = replace(recipe, objective=Natural(temperature=float(temperature)))
        folder = paper.given.out / "nets" / f"distilled-{temperature}-{plan.identity[:8]}-{data.hash[:8]}"
        student = (
            distil(plan, out=folder, data=data, device=paper.given.device).student.model.eval().requires_grad_(False)
        )
        rows.append(row(str(temperature), student, test, few, radius))
    paper.table("Nets by temperature", rows)
    statements(paper, rows, f"accuracy under APGD, {radius}")
    draw(paper, rows)
    paper.end("distillation")


def statements(paper: Paper, rows: list[dict[str, Any]], apgd: str) -> None:
    """What the paper says, and what its critics say."""
    bare, last = rows[0], rows[-1]
    worst = max(bare["accuracy"].value - one["accuracy"].value for one in rows[1:])
    paper.state(
        "distillation costs at most 1.5 points of accuracy", worst <= 0.015, f"at most {100 * worst:.1f} points"
    )
    paper.state(
        f"JSMA succeeds on nearly all without distillation (published: {PUBLISHED['undistilled']})",
        bare["JSMA on softmax"].value > 0.9, str(bare["JSMA on softmax"]),
    )  # fmt: skip
    paper.state(
        f"and on next to none at the highest temperature (published: {PUBLISHED['distilled']})",
        last["JSMA on softmax"].value < 0.05, str(last["JSMA on softmax"]),
    )  # fmt: skip
    fall = [one["JSMA on softmax"].value for one in rows[1:]]
    paper.state(
        "the higher the temperature, the fewer succeed",
        fall == sorted(fall, reverse=True),
        ", ".join(f"{v:.0%}" for v in fall),
    )
    slopes = [one["mean gradient"] for one in rows[1:]]
    paper.state("the gradients of the softmax shrink with the temperature", slopes == sorted(slopes, reverse=True),
                ", ".join(f"{v:.1e}" for v in slopes))  # fmt: skip
    same = bare["JSMA on logits"].value - last["JSMA on logits"].value
    paper.state("Carlini and Wagner: on the logits the same attack does not notice the defense", same < 0.1,
                f"{bare['JSMA on logits']} and {last['JSMA on logits']}")  # fmt: skip
    kept = last[apgd].value - bare[apgd].value
    paper.state("nor does an attack on the logits within a radius", kept < 0.1, f"{bare[apgd]} and {last[apgd]}")


def draw(paper: Paper, rows: list[dict[str, Any]]) -> None:
    """Success, accuracy, changed pixels and gradients against T."""
    plt, distilled = pyplot(), rows[1:]
    at = [float(one["T"]) for one in distilled]
    figure, axes = plt.subplots(2, 2, figsize=(7.2, 5.2))
    for key in ("JSMA on softmax", "JSMA on logits"):
        low, high = zip(*(one[key].interval for one in distilled), strict=True)
        middle = [one[key].value for one in distilled]
        axes[0, 0].plot(at, middle, marker="o", markersize=3, label=key.split(" on ")[1])
        axes[0, 0].fill_between(at, low, high, alpha=0.2)
    axes[0, 0].set(title="JSMA succeeds", ylim=(0, 1))
    axes[0, 0].legend(title="on")
    axes[0, 1].plot(
        at, [one["accuracy"].value - rows[0]["accuracy"].value for one in distilled], marker="o", markersize=3
    )
    axes[0, 1].axhline(0, color="grey", linewidth=0.8)
    axes[0, 1].set(title="accuracy against the undistilled net")
    axes[1, 0].plot(at, [one["changed pixels"] for one in distilled], marker="o", markersize=3)
    axes[1, 0].set(title="share of pixels changed, where it succeeds")
    axes[1, 1].plot(at, [one["mean gradient"] for one in distilled], marker="o", markersize=3)
    axes[1, 1].set(title="mean gradient of the softmax", yscale="log")
    for axis in axes.flat:
        axis.set(xscale="log", xlabel="temperature")
        axis.set_xticks(at, [f"{t:.0f}" for t in at])
    print(*save(figure, paper.given.out, "distillation"))


if __name__ == "__main__":
    main()

"""Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards deep learning models resistant to adversarial attacks" (ICLR 2018), rebuilt.

    python recipes/madry_paper.py                            # Fashion-MNIST at Linf 0.1, small nets
    python recipes/madry_paper.py --data idx:FOLDER --full   # MNIST's files at Linf 0.3, the paper's net, 10^5 starts for figure 2

Figures 1 (the loss climbs alike from every start, and less far on a robust net), 2 (its local maxima lie close together), 4
(capacity: only wide nets can be trained against PGD), 6 (accuracy against the radius, Linf and L2, with the decision boundary
attack; and on one axis of the root mean square change) and the table of attacks on the robust net. What the paper shows for
CIFAR-10 needs its images without loss and a ResNet, and is not rebuilt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from _figures import pyplot, save
from _papers import Paper, Share, right
from torch import Tensor, nn

import mohs
from mohs.attacks import FGSM, PGD, Boundary, Stop
from mohs.data import Dataset
from mohs.defenses.training import Adam, Natural, Recipe, Saddle
from mohs.objectives import plain_cross_entropy

WIDTHS = (1, 2, 4, 8, 16)
PUBLISHED = {
    "clean": "98.8%", "FGSM": "95.6%", "PGD 40 x 1": "93.2%", "PGD 100 x 1": "91.8%", "PGD 40 x 20": "90.4%", "PGD 100 x 20": "89.3%",
    "targeted 40 x 1": "92.7%", "transferred FGSM": "96.8%", "transferred PGD 40": "96.0%",
}  # fmt: skip
"""MNIST, Linf 0.3: the paper's table for its net, and for points of a net trained alike."""


class Settings:
    """Sizes: ours by default, the paper's where asked."""

    def __init__(self, paper: Paper) -> None:
        full = paper.full
        self.eps, self.eps2 = (0.3, 1.5) if full else (0.1, 1.5)
        self.threat, self.threat2 = f"linf:{self.eps}", f"l2:{self.eps2}"
        self.width, self.steps = (16, 40) if full else (4, 10)
        self.epochs, self.train, self.test = (84, 60_000, 10_000) if full else (6, 10_000, paper.given.n)
        self.starts, self.looks = (100_000, 2000) if full else (1000, 2000)
        self.widths = WIDTHS if full else WIDTHS[:4]


def recipe(paper: Paper, size: Settings, objective: Any, threat: str | None, width: int, seed: int = 0) -> Recipe:
    """One training; the radius grows over the first third, without which wide radii end at chance."""
    attacked = None if isinstance(objective, Natural) else threat
    return Recipe(
        "madry", paper.given.data, "madry_cnn", objective, epochs=size.epochs, threat=attacked, batch=64, optimiser=Adam(lr=1e-3),
        warmup=0.0 if attacked is None else size.epochs / 3, holdout=0, seed=seed, net_options={"width": width},
    )  # fmt: skip


def traces(net: nn.Module, x: Tensor, y: Tensor, threat: str, steps: int, starts: int, seed: int = 0) -> Tensor:
    """The cross-entropy along PGD, [N, starts, steps + 1]."""
    attack = PGD(steps=steps, objective=plain_cross_entropy)
    found = mohs.attack(attack, net, x, y, threat, restarts=starts, trace=True, seed=seed)
    assert found.trace is not None
    return found.trace


def landscapes(paper: Paper, size: Settings, nets: dict[str, nn.Module], test: Dataset) -> None:
    """Figures 1 and 2."""
    plt, both = pyplot(), right(nets["natural"], test) & right(nets["PGD"], test)
    few = test.take(len(test))
    x, y = few.x[both][:5], few.y[both][:5]
    figure, axes = plt.subplots(2, 5, figsize=(10, 4.2), sharex=True)
    ends: dict[str, Tensor] = {}
    for line, (name, net) in zip(axes, ((k, nets[k]) for k in ("natural", "PGD")), strict=True):
        loss = traces(net, x, y, size.threat, 40, 20)
        ends[name] = loss[:, :, -1]
        for i, axis in enumerate(line[: len(x)]):
            axis.plot(loss[i].T.cpu(), linewidth=0.8, alpha=0.7)
            axis.set(
                title=f"{name}, image {i + 1}",
                xlabel="step" if name == "PGD" else "",
                ylabel="" if i else "cross-entropy",
            )
    print(*save(figure, paper.given.out, "madry-figure1"))
    figure, axes = plt.subplots(1, 5, figsize=(10, 2.3))
    spread: dict[str, list[float]] = {}
    for name in ("natural", "PGD"):
        maxima = traces(nets[name], x, y, size.threat, 40, size.starts, seed=1)[:, :, -1].cpu()
        spread[name] = (maxima.std(1) / maxima.mean(1)).tolist()
        for i, axis in enumerate(axes[: len(x)]):
            axis.hist(maxima[i].numpy(), bins=40, density=True, alpha=0.7, label=name)
            axis.set(title=f"image {i + 1}", xlabel="loss at the end", yticks=[])
    axes[0].legend()
    print(*save(figure, paper.given.out, "madry-figure2"))
    drop = float(ends["natural"].mean() / ends["PGD"].mean())
    paper.state("figure 1: the losses that PGD ends at are far lower on the robust net", drop > 4, f"{drop:.1f} times")
    widest = max(spread["PGD"])
    paper.state(f"figure 2: over {size.starts} starts the maxima of the robust net lie close together", widest < 0.1,
                f"standard deviation at most {widest:.1%} of the mean; of the natural net {max(spread['natural']):.1%}")  # fmt: skip


def survived(net: nn.Module, data: Dataset, attack: Any, threat: str, **more: Any) -> Share:
    """Who is right and withstands an attack."""
    out = mohs.attack(attack, net, data.x, data.y, threat, **more)
    return Share.of(~out.success & right(net, data))


def table(paper: Paper, size: Settings, nets: dict[str, nn.Module], test: Dataset) -> None:
    """The robust net under one step, many steps, restarts, targets, and points of other nets."""
    net, threat = nets["PGD"], size.threat

    def pgd(steps: int) -> PGD:
        return PGD(steps=steps, objective=plain_cross_entropy)

    def transferred(source: nn.Module, attack: Any) -> Share:
        points = mohs.attack(attack, source, test.x, test.y, threat, stop=Stop.BUDGET).x
        return Share.of(right(net, Dataset(points, test.y)))

    towards = (test.y + torch.randint(1, 10, test.y.shape, generator=torch.Generator().manual_seed(0)).to(test.y)) % 10
    targeted = mohs.attack(pgd(40), net, test.x, test.y, threat, targets=towards)
    reached = right(net, Dataset(targeted.x, test.y))
    found = {
        "clean": Share.of(right(net, test)),
        "FGSM": survived(net, test, FGSM(objective=plain_cross_entropy), threat),
        "PGD 40 x 1": survived(net, test, pgd(40), threat),
        "PGD 100 x 1": survived(net, test, pgd(100), threat),
        "PGD 40 x 20": survived(net, test, pgd(40), threat, restarts=20),
        "PGD 100 x 20": survived(net, test, pgd(100), threat, restarts=20),
        "targeted 40 x 1": Share.of(reached),
        "transferred FGSM": transferred(nets["PGD, another seed"], FGSM(objective=plain_cross_entropy)),
        "transferred PGD 40": transferred(nets["PGD, another seed"], pgd(40)),
        "transferred PGD 40 of a natural net": transferred(nets["natural"], pgd(40)),
    }
    rows = [{"attack": k, "accuracy": v, "published (MNIST, Linf 0.3)": PUBLISHED.get(k, "")} for k, v in found.items()]
    paper.table(f"The robust net, {threat}", rows)
    own = survived(nets["natural"], test, pgd(40), threat)
    paper.state("the net trained naturally has nothing left under PGD", own.value < 0.05, str(own))
    order = [found[k].value for k in ("clean", "FGSM", "PGD 40 x 1", "PGD 40 x 20", "PGD 100 x 20")]
    paper.state(
        "more steps and more restarts find more",
        order == sorted(order, reverse=True),
        ", ".join(f"{v:.1%}" for v in order),
    )
    gap = found["transferred PGD 40"].value - found["PGD 40 x 1"].value
    paper.state("points of a net trained alike fool it less than its own", gap > 0, f"{100 * gap:.1f} points")


def capacity(paper: Paper, size: Settings, data: Dataset, test: Dataset) -> None:
    """Figure 4."""
    ways = {"natural": Natural(), "FGSM": Saddle(FGSM()), "PGD": Saddle(PGD(steps=size.steps))}
    rows = []
    for width in size.widths:
        for way, objective in ways.items():
            net = paper.trained(recipe(paper, size, objective, size.threat, width), data)
            pgd = survived(net, test, PGD(steps=40, objective=plain_cross_entropy), size.threat)
            loss = traces(net, data.x[:500], data.y[:500], size.threat, 10, 1)[:, 0, -1].mean()
            fgsm = survived(net, test, FGSM(objective=plain_cross_entropy), size.threat)
            rows.append({"width": width, "trained": way, "clean": Share.of(right(net, test)), "FGSM": fgsm, "PGD 40": pgd,
                         "loss at PGD's points of the training set": float(loss)})  # fmt: skip
    paper.table("Figure 4: capacity", rows)
    plt = pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.6))
    for axis, way in zip(axes, ways, strict=False):
        for key in ("clean", "FGSM", "PGD 40"):
            axis.plot(
                size.widths,
                [row[key].value for row in rows if row["trained"] == way],
                marker="o",
                markersize=3,
                label=key,
            )
        axis.set(title=f"trained: {way}", xlabel="width", xscale="log", ylim=(0, 1))
    for way in ways:
        axes[3].plot(
            size.widths,
            [row["loss at PGD's points of the training set"] for row in rows if row["trained"] == way],
            label=way,
        )
    axes[3].set(title="loss at PGD's points", xlabel="width", xscale="log", yscale="log")
    axes[0].legend()
    axes[3].legend()
    for axis in axes:
        axis.set_xticks(size.widths, [str(w) for w in size.widths])
    print(*save(figure, paper.given.out, "madry-figure4"))
    robust = [row for row in rows if row["trained"] == "PGD"]
    better = robust[-1]["PGD 40"].value > robust[0]["PGD 40"].value + 0.02
    paper.state("figure 4: wider nets are more robust when trained against PGD", better,
                f"{robust[0]['PGD 40']} at width {size.widths[0]}, {robust[-1]['PGD 40']} at {size.widths[-1]}")  # fmt: skip
    narrow = [row for row in rows if row["width"] == size.widths[0]]
    paid = narrow[2]["clean"].value < narrow[0]["clean"].value - 0.02
    paper.state("figure 4: the narrowest net pays for it with clean accuracy", paid,
                f"{narrow[0]['clean']} natural, {narrow[2]['clean']} against PGD")  # fmt: skip
    fgsm = [row for row in rows if row["trained"] == "FGSM"][-1]
    paper.state("figure 4: training on one step does not withstand many", fgsm["PGD 40"].value < fgsm["FGSM"].value - 0.1,
                f"{fgsm['FGSM']} under FGSM, {fgsm['PGD 40']} under PGD")  # fmt: skip


def radii(paper: Paper, size: Settings, nets: dict[str, nn.Module], test: Dataset) -> None:
    """Figure 6, in both norms, and on one axis of the root mean square change."""
    few, width = test.take(min(len(test), 500 if paper.full else 100)), test.x[0].numel() ** 0.5
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(10, 3))
    grid = {"linf": torch.linspace(0, 1.5, 11) * size.eps, "l2": torch.linspace(0, 3, 11)}
    kept: dict[tuple[str, str], list[float]] = {}
    for axis, norm in zip(axes, grid, strict=False):
        for colour, name in enumerate(("natural", "PGD", "PGD in L2")):
            net = nets[name]
            curve = [Share.of(right(net, few)).value]
            curve += [survived(net, few, PGD(steps=100), f"{norm}:{eps}").value for eps in grid[norm].tolist()[1:]]
            kept[name, norm] = curve
            axis.plot(grid[norm], curve, label=name, color=f"C{colour}")
            if norm == "l2":
                out = mohs.attack(Boundary(steps=size.looks), net, few.x, few.y, "l2:inf")
                sizes = torch.where(right(net, few), out.size, 0.0)
                walked = [float((sizes > eps).double().mean()) for eps in grid[norm].tolist()]
                kept[name, "boundary"] = walked
                axis.plot(grid[norm], walked, color=f"C{colour}", linestyle="--")
        axis.set(
            title=f"{norm.capitalize()}: PGD{', dashed: boundary attack' if norm == 'l2' else ''}",
            xlabel="radius",
            ylim=(0, 1),
        )
    for colour, name in enumerate(("natural", "PGD", "PGD in L2")):
        # within a Linf ball the root mean square change is the radius, at most; within an L2 ball the radius over the root of d
        axes[2].plot(grid["linf"], kept[name, "linf"], color=f"C{colour}", label=name)
        axes[2].plot(grid["l2"] / width, kept[name, "l2"], color=f"C{colour}", linestyle=":")
    axes[2].set(title="by root mean square (dotted: L2)", xlabel="largest root mean square change", ylim=(0, 1))
    axes[0].set(ylabel="accuracy")
    axes[0].legend()
    print(*save(figure, paper.given.out, "madry-figure6"))
    at = 5
    walked, climbed = kept["PGD", "boundary"][at], kept["PGD", "l2"][at]
    paper.state(
        "figure 6: of the net trained in Linf, the boundary attack breaks more in L2 than PGD does (PGD overestimates)",
        walked < climbed, f"at radius {grid['l2'][at]:.2g} it leaves {walked:.0%}, PGD {climbed:.0%}",
    )  # fmt: skip
    inner, other = kept["PGD", "linf"][7], kept["PGD in L2", "linf"][7]
    paper.state(
        "figure 6: each training is best in its own norm", inner > other and kept["PGD in L2", "l2"][at] > climbed,
        f"Linf {inner:.0%} and {other:.0%}, L2 {climbed:.0%} and {kept['PGD in L2', 'l2'][at]:.0%}",
    )  # fmt: skip


def main() -> None:
    """Everything, in the paper's order."""
    paper = Paper.parse(__doc__, n=(500, "test images"))
    size = Settings(paper)
    data, test = paper.data("train", size.train), paper.data("test", size.test)
    robust = Saddle(PGD(steps=size.steps))
    plans = {
        "natural": recipe(paper, size, Natural(), None, size.width),
        "PGD": recipe(paper, size, robust, size.threat, size.width),
        "PGD, another seed": recipe(paper, size, robust, size.threat, size.width, seed=1),
        "PGD in L2": recipe(paper, size, robust, size.threat2, size.width),
    }
    nets = {name: paper.trained(replace(plan), data) for name, plan in plans.items()}
    landscapes(paper, size, nets, test)
    table(paper, size, nets, test)
    capacity(paper, size, data, test)
    radii(paper, size, nets, test)
    paper.end("madry")


if __name__ == "__main__":
    main()

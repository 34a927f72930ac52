"""Moosavi-Dezfooli, Fawzi, Frossard, "DeepFool: a simple and accurate method to fool deep neural networks" (CVPR 2016), rebuilt.

    python recipes/deepfool_paper.py                            # Fashion-MNIST, minutes; tables, statements and figures
    python recipes/deepfool_paper.py --data idx:FOLDER --full   # MNIST's files, all of them, as in the paper

Tables 1 and 2 (error, mean relative size of the changes in L2 and Linf, time, passes), table 3 (error after fine-tuning), figures 1,
6, 7, 8 and 9, on LeNet and on the fully connected net 500-150-10. The other nets of the paper need CIFAR-10 without loss, or
ImageNet, and are not rebuilt.

Measured on Fashion-MNIST (10,000 training images, 500 test images; published figures are of MNIST, an easier task):

    net            error   rho DeepFool   rho L-BFGS   rho FGSM at 90%   rho_inf DeepFool / FGSM   ms DeepFool / L-BFGS
    LeNet          12.0%       .061          .053           .299              .039 / .118               8.4 / 70.7
    FC500-150-10   14.6%       .054          .049           .228              .030 / .090               1.3 / 25.4

    mean |r| / |x| after five more epochs on    DeepFool   FGSM   clean   DeepFool x2   x3    (after one on DeepFool)
    LeNet                   .061 before           .081     .031    .056       .036     .031          .096
    FC500-150-10            .054 before           .055     .023    .053       .029     .025          .087

17 of 19 statements hold. The two that fail: L-BFGS finds changes smaller by a tenth, for the time that the table shows.
"""

from __future__ import annotations

import time
from typing import Any

from _figures import pyplot, save
from _papers import Paper, Share, mean_and_error, right
from torch import Tensor, nn

import mohs
from mohs.attacks import FGSM, LBFGS, DeepFool
from mohs.data import Dataset
from mohs.defenses.training import Adam, FineTune, Natural, Recipe
from mohs.evaluation.robustness import relative_sizes, smallest_radius

NETS = {"LeNet": "lenet", "FC500-150-10": "fc_500_150_10"}
PUBLISHED = {
    "LeNet": {"error": "1%", "DeepFool": 0.20, "FGSM": 1.0, "L-BFGS": 0.25, "DeepFool Linf": 0.10, "FGSM Linf": 0.26},
    "FC500-150-10": {"error": "1.7%", "DeepFool": 0.11, "FGSM": 0.39, "L-BFGS": 0.12, "DeepFool Linf": 0.04, "FGSM Linf": 0.11},
}  # fmt: skip
"""On MNIST: tables 1 and 2."""
TUNED = {"LeNet": ("0.8%", "4.4%", "1%"), "FC500-150-10": ("1.5%", "4.9%", "1.7%")}
"""Error after fine-tuning on points of DeepFool, of FGSM, and on clean images: table 3."""
LR, EPOCHS = 1e-3, 5
FOOLED = 0.9
"""FGSM's radius is the smallest that fools so many, as in the paper."""


def base(paper: Paper, net: str) -> Recipe:
    """How a net comes to be, before it is tuned."""
    epochs = 20 if paper.full else 8
    return Recipe(
        f"deepfool-{net}", paper.given.data, net, Natural(), epochs=epochs, batch=64, optimiser=Adam(lr=LR), holdout=0
    )  # fmt: skip


def robustness(net: nn.Module, x: Tensor) -> tuple[float, float]:
    """Mean relative size of DeepFool's changes, and half of its interval."""
    return mean_and_error(relative_sizes(DeepFool(steps=50), net, x))


def fgsm_radius(net: nn.Module, x: Tensor) -> tuple[float, float]:
    """The radius at which FGSM changes nine answers of ten; and the mean relative sizes of its changes, in L2."""
    radius = smallest_radius(net, x, share=FOOLED)
    width = x[0].numel() ** 0.5
    return radius.eps, float((radius.eps * width / x.flatten(1).norm(dim=1)).mean())


def first_tables(paper: Paper, nets: dict[str, nn.Module], test: Dataset) -> None:
    """Tables 1 and 2."""
    rows: list[dict[str, Any]] = []
    for name, net in nets.items():
        row: dict[str, Any] = {
            "net": name,
            "error": Share.of(~right(net, test)),
            "published error (MNIST)": PUBLISHED[name]["error"],
        }
        label = net(test.x).argmax(1)
        for title, attack in {"DeepFool": DeepFool(steps=50), "L-BFGS": LBFGS()}.items():
            began = time.perf_counter()
            sizes = relative_sizes(attack, net, test.x)
            seconds = (time.perf_counter() - began) / len(test)
            middle, half = mean_and_error(sizes)
            row |= {f"rho {title}": f"{middle:.3f} +- {half:.3f}", f"(published) {title}": PUBLISHED[name][title],
                    f"ms {title}": 1000 * seconds}  # fmt: skip
            row[f"_{title}"] = middle
        eps, row["_FGSM"] = fgsm_radius(net, test.x)
        row |= {"rho FGSM at 90%": f"{row['_FGSM']:.3f}", "(published) FGSM": PUBLISHED[name]["FGSM"]}
        out = mohs.attack(DeepFool(steps=50), net, test.x, label, "l2:inf")
        row["passes of DeepFool"] = float((out.forwards + out.backwards).double().mean())
        linf = relative_sizes(DeepFool(steps=50), net, test.x, norm="linf")
        row |= {
            "rho_inf DeepFool": mean_and_error(linf)[0],
            "(published) DeepFool Linf": PUBLISHED[name]["DeepFool Linf"],
        }
        row |= {
            "rho_inf FGSM": float((eps / test.x.flatten(1).amax(1)).mean()),
            "(published) FGSM Linf": PUBLISHED[name]["FGSM Linf"],
        }
        rows.append(row)
    paper.table("Tables 1 and 2", [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows])
    for row in rows:
        deep, sign, newton = row["_DeepFool"], row["_FGSM"], row["_L-BFGS"]
        paper.state(
            f"{row['net']}: FGSM's changes are about five times as large as DeepFool's",
            sign > 2.5 * deep,
            f"{sign / deep:.1f} times",
        )
        paper.state(
            f"{row['net']}: L-BFGS does not find smaller changes than DeepFool",
            newton > 0.98 * deep,
            f"{newton / deep:.2f} times",
        )
        paper.state(f"{row['net']}: DeepFool is much faster than L-BFGS", row["ms L-BFGS"] > 3 * row["ms DeepFool"],
                    f"{row['ms L-BFGS'] / row['ms DeepFool']:.1f} times")  # fmt: skip
    order = [row["_DeepFool"] for row in rows]
    paper.state(
        "LeNet is more robust than the fully connected net", order[0] > order[1], f"{order[0]:.3f} and {order[1]:.3f}"
    )


def tuned(
    paper: Paper, net: nn.Module, arch: str, objective: Any, data: Dataset, eps: float, lr: float = LR / 2
) -> list[nn.Module]:
    """The net after each further epoch on these points; the points are made once."""
    threat = None
    if isinstance(objective, FineTune):
        threat = "l2:inf" if objective.unbounded else f"linf:{eps}"
    recipe = Recipe(
        f"deepfool-{arch}-tuned", paper.given.data, arch, objective, epochs=EPOCHS, threat=threat, batch=64, optimiser=Adam(lr=lr),
        holdout=0, seed=1,
    )  # fmt: skip
    return paper.each_epoch(recipe, data, net)


def tune(paper: Paper, nets: dict[str, nn.Module], data: Dataset, test: Dataset) -> None:
    """Table 3 and figures 6, 7 and 9."""
    rows, curves = [], {}
    for name, net in nets.items():
        eps = round(fgsm_radius(net, test.x[:200])[0], 4)
        ways = {
            "DeepFool": FineTune(DeepFool()), "FGSM": FineTune(FGSM()), "clean": Natural(),
            "DeepFool x2": FineTune(DeepFool(), scale=2.0), "DeepFool x3": FineTune(DeepFool(), scale=3.0),
        }  # fmt: skip
        start, row = robustness(net, test.x), {"net": name, "error before": Share.of(~right(net, test))}
        for way, objective in ways.items():
            after = tuned(paper, net, NETS[name], objective, data, eps)
            curves[name, way] = [start, *(robustness(one, test.x) for one in after)]
            row |= {
                f"error after {way}": Share.of(~right(after[-1], test)),
                f"rho after {way}": curves[name, way][-1][0],
            }
        slow = tuned(paper, net, NETS[name], ways["FGSM"], data, eps, lr=LR / 20)
        curves[name, "FGSM, a tenth of the rate: DeepFool"] = [start, *(robustness(one, test.x) for one in slow)]
        curves[name, "FGSM, a tenth of the rate: FGSM"] = [(fgsm_radius(one, test.x)[1], 0.0) for one in (net, *slow)]
        row["(published) error after DeepFool / FGSM / clean"] = " / ".join(TUNED[name])
        rows.append(row)
        first, last = curves[name, "DeepFool"][1][0] / start[0], curves[name, "DeepFool"][-1][0] / start[0]
        paper.state(
            f"{name}: one epoch on DeepFool's points raises robustness by half",
            first > 1.4,
            f"x{first:.2f}, after five x{last:.2f}",
        )
        for way in ("FGSM", "clean", "DeepFool x2", "DeepFool x3"):
            ratio = curves[name, way][-1][0] / start[0]
            text = "leaves robustness about as it was" if way == "clean" else "lowers robustness"
            holds = 0.8 < ratio < 1.3 if way == "clean" else ratio < 1
            paper.state(f"{name}: tuning on {way}{' images' if way == 'clean' else ''} {text}", holds, f"x{ratio:.2f}")
        deep, sign = (curves[name, f"FGSM, a tenth of the rate: {how}"] for how in ("DeepFool", "FGSM"))
        paper.state(f"{name}: judged by FGSM instead of DeepFool, tuning on FGSM's points looks better than it is",
                    sign[-1][0] / sign[0][0] > deep[-1][0] / deep[0][0],
                    f"x{sign[-1][0] / sign[0][0]:.2f} by FGSM, x{deep[-1][0] / deep[0][0]:.2f} by DeepFool")  # fmt: skip
    paper.table("Table 3", rows)
    draw_curves(paper, curves)


def draw_curves(paper: Paper, curves: dict[tuple[str, str], list[tuple[float, float]]]) -> None:
    """Figures 6 (what it is tuned on), 7 (how large the changes are) and 9 (who judges)."""
    plt = pyplot()
    groups = {
        "figure 6: tuned on": ("DeepFool", "FGSM", "clean"),
        "figure 7: DeepFool's changes times": ("DeepFool", "DeepFool x2", "DeepFool x3"),
        "figure 9: tuned on FGSM, judged by": ("FGSM, a tenth of the rate: DeepFool", "FGSM, a tenth of the rate: FGSM"),
    }  # fmt: skip
    names = list(dict.fromkeys(name for name, _ in curves))
    figure, axes = plt.subplots(len(names), len(groups), figsize=(3.4 * len(groups), 2.7 * len(names)), squeeze=False)
    for line, name in zip(axes, names, strict=True):
        for axis, (title, ways) in zip(line, groups.items(), strict=True):
            for way in ways:
                middle, half = zip(*curves[name, way], strict=True)
                axis.errorbar(range(len(middle)), middle, half, label=way.split(": ")[-1], capsize=2)
            axis.set(title=f"{name}\n{title}", xlabel="further epochs", ylabel="mean |r| / |x|")
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3)
    print(*save(figure, paper.given.out, "deepfool-tuning"))


def pictures(paper: Paper, nets: dict[str, nn.Module], test: Dataset) -> None:
    """Figures 1 and 8: an image, both changes, and DeepFool's change one to five times."""
    plt, net = pyplot(), nets["LeNet"]
    x = test.x[right(net, test)][:4]
    label = net(x).argmax(1)
    deep = mohs.attack(DeepFool(), net, x, label, "l2:inf").x - x
    eps = fgsm_radius(net, test.x[:200])[0]
    sign = mohs.attack(FGSM(), net, x, label, f"linf:{eps}", stop=mohs.Stop.BUDGET).x - x
    columns = [
        ("image", x),
        ("DeepFool: change", deep),
        ("with it", x + deep),
        ("FGSM: change", sign),
        ("with it", x + sign),
    ]
    columns += [(f"DeepFool x{alpha}", x + alpha * deep) for alpha in (2, 3, 5)]
    figure, axes = plt.subplots(len(x), len(columns), figsize=(1.5 * len(columns), 1.65 * len(x)))
    for line, row in enumerate(axes):
        for axis, (title, shown) in zip(row, columns, strict=True):
            change = "change" in title
            image = shown[line].detach().cpu().permute(1, 2, 0)
            axis.imshow(image, cmap="RdBu" if change else "gray", vmin=-eps if change else 0, vmax=eps if change else 1)
            axis.set(xticks=[], yticks=[], title=title if not line else "")
            if not change:
                axis.set_xlabel(f"{int(net(shown[line : line + 1]).argmax())}")
    print(*save(figure, paper.given.out, "deepfool-pictures"))


def main() -> None:
    """Everything, in the paper's order."""
    paper = Paper.parse(__doc__, n=(500, "test images"), train=(10_000, "training images"))
    data = paper.data("train", 60_000 if paper.full else paper.given.train)
    test = paper.data("test", 10_000 if paper.full else paper.given.n)
    nets = {name: paper.trained(base(paper, arch), data) for name, arch in NETS.items()}
    first_tables(paper, nets, test)
    pictures(paper, nets, test)
    tune(paper, nets, data, test)
    paper.end("deepfool")


if __name__ == "__main__":
    main()

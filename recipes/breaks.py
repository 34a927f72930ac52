"""Defenses at inference time, each attacked as its authors would have, and as itself: the table of Athalye et al., rebuilt small.

    python recipes/breaks.py                       # every defense here, 500 images, prints the table
    python recipes/breaks.py --only jpeg:75 --rows 100

Each defense stands before the bundled net for Fashion-MNIST that knows no adversary (fashion-natural), at Linf 0.1, but for those of
LEARNT: the thermometer's net and two of the ensembles' three are trained here, on 6,000 images for three epochs. The last rows
are the net trained against PGD, which must keep its robustness, and it behind a codec. Columns, all accuracies:

    clean       without an attack (a random defense: by majority of 20 draws)
    naive       PGD, 40 steps of cross-entropy, with the defended model's own gradients, as a paper of its time would (of a model
                that rejects: with those of its classes, and whatever is rejected then counts for it)
    hand-made   PGD, 100 steps of the margin, with the stand-in the defense declares and the mean of 10 evaluations where it is random;
                and the naive one: who survives both
    declared    Mohs's plan, told what the defense declares
    withheld    the same on the model as an opaque module: no layer and no declaration can be seen
    expected    was it expected to fall (below), and did it in both columns: 'fell' or 'MISSED'; the robust net and what stands before
                it must keep what they have: 'kept' or 'LOST'; '-' where nothing was expected
    obfuscation what Athalye et al. would call the gradients, by what helped against them: shattered, stochastic, vanishing
    through     where the attacks of 'withheld' took their gradients, and which checks led there

The defenses against patches stand before the same net under a threat of their own (PATCHES), beside the net without them; there
'hand-made' is LaVAN, 100 steps.

What is expected to fall was written down before the run: all that change the input, the logits or the gradient of a net without
robustness of its own, to within 2 points of the undefended net's accuracy (EXPECTED); random resizing, noise, crops, pruning and
k-winners are not on that list, because noise and thresholds make any net a little smoother, nor is Defense-GAN, which costs accuracy
without an attack, nor are the ensembles, whose other nets are others. The two
generative defenses stand on 100 images at most; Defense-GAN takes 50 steps from 2 starts (the paper: 200 from 10).

Measured on 500 images with the plan 'standard' (percent; clean, naive, hand-made, declared, withheld):

    no defense                          90.2    1.4    1.0    0.2    0.2
    robust net                          85.0   72.0   72.0   69.8   69.8
    robust net, jpeg:75                 85.2   85.2   71.8   67.4   67.4
    bit-depth:3                         90.2   87.4    0.4    0.0    0.0
    jpeg:75                             90.0   90.0    1.8    1.2    1.2
    gaussian-blur                       85.8    1.0    0.6    0.0    0.0
    mean-blur                           86.2    1.4    1.2    0.0    0.0
    median-blur                         87.4    1.2    1.2    0.6    0.6
    total-variation                     88.0   88.0    2.2    1.6    1.8
    non-local-means                     89.0   89.0    9.0    7.0    8.4
    detach                              90.2   88.0    1.0    0.2    0.2
    logit-rounding:1                    90.0   88.0    0.8    0.2    0.2
    logit-scale:100                     90.2   82.0    2.2    0.2    0.2
    double-softmax                      90.2    1.4    1.4    0.2    0.2
    k-winners                           85.0   12.2   10.6    8.0    8.0
    gradient-noise                      90.2   43.6    1.0    0.2    0.2
    gradient-truncation                 90.2   88.0    1.0    0.2    0.2
    bit-depth:3,jpeg:75                 89.8   89.8    0.4    0.0    0.0
    activation-pruning                  88.6    2.8    1.6    1.8    1.8
    thermometer:16                      84.2   84.2    3.8    3.0    3.4
    defensive-perturbation              87.8   12.4   11.6    7.0    7.0
    majority-vote of 3                  88.0   88.0   10.6    8.8    8.8
    mean-logits of 3                    89.8    9.2    8.8    7.8    7.8
    mean-probabilities of 3             89.6   10.8   10.4    9.2    9.2
    lid                                 86.2   28.8    1.8    0.6    0.6
    bit-depth:4, lid                    86.6   85.4    1.2    0.0    0.0
    mahalanobis                         87.2   28.6    6.2    1.8    1.8
    binary-detector                     86.6   86.6    3.6    2.2    2.2
    trapdoor                            84.2   43.8    0.0    0.0    0.0
    pca-whitening                       86.4   86.4    1.4    0.6    0.6
    magnet                              87.2   58.4   15.0   13.0   13.0
    feature-squeezing                   85.2   24.4   20.4    7.4   14.2
    digital-watermarking, fixed patch   83.2   83.2   48.0   37.4   37.6
    crop-ensemble:10                    58.6   14.4   12.4   10.2   10.2
    reject-disagreement of 3 *          78.2   32.8   38.4   18.6   18.6
    random-resize-pad *                 81.4    5.6    3.0    1.8    1.8
    noise-input:0.1                     88.2    2.0    2.0    1.8    1.8
    noise-input:0.1,bit-depth:3         88.0   87.2    2.0    1.8    1.8
    no defense, patch                   90.2   62.8   15.2   12.2   12.2
    local-gradients-smoothing           79.8   57.4    9.6    4.4    4.4
      with :2.3:0.2:5:2                 80.6   57.8   11.8    8.6    8.6
    digital-watermarking                83.2   83.2    6.8    3.2    3.8
    no defense, fixed patch             90.2   61.8   59.6   58.2   58.2
    local-gradients-smoothing:2.3:0.2:5:2,
      fixed patch                       80.6   48.8   43.8   37.2   37.2

A random defense is broken at an example, in every column, where the point that was found is confirmed on fresh draws
(``mohs.evaluation.confirm``). Expected to fall to within 2 points of 0.2 (12.2 for patches, 58.2 in a fixed
place), and MISSED: non-local-means and thermometer:16 by a few images, defensive-perturbation ('thorough' leaves 6.7% of 150),
feature-squeezing, and magnet (APGD of 100 steps on its classes alone, the detectors ignored, leaves 15% of 100). A row
with * was measured before 'hand-made' meant who survives both. One image fewer falls to the plan than by hand behind
activation-pruning: each is confirmed on other draws. Not yet measured on as many images: quilting, pixel-defend, defense-gan:50:2.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _detectors import DETECTORS, THREAT
from _papers import FASHION
from torch import Tensor, nn

import mohs
from mohs import defenses, models
from mohs.attacks import BIM, FGSM, PGD, LaVAN
from mohs.data import Dataset, load
from mohs.defenses.training import Adam, Cascade, Recipe, UnifiedEmbedding
from mohs.evaluation.training import train
from mohs.objectives import plain_cross_entropy
from mohs.threat import Threat

DRAWS = 20
SINGLE = (
    "bit-depth:3", "jpeg:75", "gaussian-blur", "mean-blur", "median-blur", "total-variation", "non-local-means",
    "crop-ensemble:10", "random-resize-pad", "noise-input:0.1", "activation-pruning", "gradient-noise", "gradient-truncation",
    "detach", "logit-rounding:1", "logit-scale:100", "double-softmax", "k-winners", "bit-depth:3,jpeg:75",
    "noise-input:0.1,bit-depth:3", "pixel-defend", "defense-gan:50:2",
)  # fmt: skip
FEWER = {"pixel-defend": 100, "defense-gan:50:2": 100}
"""Rows whose defense costs a second or more per hundred answers: at most so many images."""
FREE, FIXED = Threat.parse("patch:5"), Threat.parse("patch@11,11:5")
PATCHES = {
    f"{text or 'no defense'}{', fixed patch' if threat is FIXED else ', patch' if not text else ''}": (text, threat)
    for threat, texts in (
        (FREE, ("", "local-gradients-smoothing", "local-gradients-smoothing:2.3:0.2:5:2", "digital-watermarking")),
        (FIXED, ("", "local-gradients-smoothing:2.3:0.2:5:2", "digital-watermarking")),
    )
    for text in texts
}
"""Rows with a threat of their own: the defense and the threat, a square of 5 pixels anywhere, or in the middle."""
EXPECTED = (frozenset(SINGLE) | frozenset(PATCHES) | {
    "thermometer:16", "defensive-perturbation", "lid", "bit-depth:4, lid", "mahalanobis", "binary-detector", "trapdoor",
    "feature-squeezing", "magnet", "pca-whitening",
}) - {
    "random-resize-pad", "noise-input:0.1", "activation-pruning", "k-winners", "crop-ensemble:10",
    "noise-input:0.1,bit-depth:3", "defense-gan:50:2",
}  # fmt: skip
PUBLISHED = {
    "jpeg:75": "0 (Guo)", "bit-depth:3": "0 (Guo)", "total-variation": "0 (Guo)", "quilting": "0 (Guo)",
    "crop-ensemble:10": "0 (Guo)", "random-resize-pad": "0 (Xie)", "activation-pruning": "0 (Dhillon)", "robust net": "47 (Madry)",
    "thermometer:16": "0 (Buckman; CIFAR-10, Linf 0.031)", "lid": "5 (Ma; CIFAR-10, Linf 0.031)",
    "cascade": "15 (Na; CIFAR-10, Linf 0.015)",
    "pixel-defend": "9 (Song; CIFAR-10, Linf 0.031)", "defense-gan:50:2": "55 (Samangouei; MNIST, L2 0.005 a pixel, BPDA; 0 in theory)",
}  # fmt: skip
"""Accuracy under Athalye et al.'s attack, in percent, on ImageNet or CIFAR-10 at other radii: repository of obfuscated-gradients."""


def trained(seed: int, encode: Callable[[Tensor], Tensor] = lambda x: x, channels: int = 1) -> nn.Module:
    """A net on the first 6,000 training images, three epochs: about a minute on one core."""
    data = load(FASHION, split="train", n=6000)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = models.nets.small_cnn(channels).train()
        optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
        for _ in range(3):
            for at in torch.randperm(len(data)).split(64):
                optimiser.zero_grad()
                nn.functional.cross_entropy(net(encode(data.x[at])), data.y[at]).backward()
                optimiser.step()
    return net.eval().requires_grad_(False)


def natural() -> nn.Module:
    """The net that all defenses stand before."""
    return copy.deepcopy(models.load("bundled:fashion-natural"))


def thermometer() -> nn.Module:
    """Sixteen levels before a net that was trained on the code."""
    defense = defenses.Thermometer(16)
    return defense(trained(0, defense.transform, 16)).eval()


def perturbed() -> nn.Module:
    """One perturbation of every input, learnt against PGD: descent on it where the attack ascends on each example."""
    net, data = natural(), load(FASHION, split="train", n=1024)
    shift = torch.zeros_like(data.x[:1])
    for step in range(32):
        part = slice(32 * step, 32 * step + 32)
        layer = defenses.DefensivePerturbation(shift[0])(net).eval()
        x = mohs.attack(PGD(steps=5), layer, data.x[part], data.y[part], THREAT).x
        shift.requires_grad_(True)
        loss = nn.functional.cross_entropy(net((x + shift).clamp(0, 1)), data.y[part])
        (slope,) = torch.autograd.grad(loss, shift)
        shift = (shift.detach() - 0.01 * slope.sign()).clamp(-0.1, 0.1)
    return defenses.DefensivePerturbation(shift[0])(net).eval()


def quilted() -> nn.Module:
    """Images built anew from 2,000 patches of training images (the paper: a million), one of the three nearest at each place."""
    bank = load(FASHION, split="train", n=1024).x
    return defenses.Quilting.of(bank, patches=2000, neighbours=3)(natural()).eval()


def several(kind: type[defenses.Defense]) -> Callable[[], nn.Module]:
    """An ensemble of the bundled net and two smaller ones."""
    return lambda: kind()(natural(), trained(1), trained(2)).eval()


def cascade() -> nn.Module:
    """Trained on one step with a unified embedding, and on points of a net that was trained so before it."""
    way = UnifiedEmbedding(FGSM())
    plan = Recipe(
        "cascade-before", FASHION, "small_cnn", way, 8, "linf:0.1", optimiser=Adam(lr=2e-3), warmup=2, holdout=0
    )

    def trained(recipe: Recipe) -> nn.Module:
        folder = Path("runs/breaks") / f"{recipe.name}-{recipe.identity[:8]}"
        return train(recipe, out=folder, data=load(FASHION, split="train", n=10_000)).model.eval().requires_grad_(False)

    before = trained(plan)
    return trained(replace(plan, name="cascade", seed=1, objective=Cascade(way, BIM(steps=10), before)))


LEARNT: dict[str, Callable[[], nn.Module]] = {
    "thermometer:16": thermometer,
    "defensive-perturbation": perturbed,
    "mean-logits of 3": several(defenses.MeanLogits),
    "mean-probabilities of 3": several(defenses.MeanProbabilities),
    "majority-vote of 3": several(defenses.MajorityVote),
    "reject-disagreement of 3": several(defenses.RejectDisagreement),
    "quilting": quilted,
    "bit-depth:4, lid": lambda: defenses.BitDepth(4)(DETECTORS["lid"](natural())).eval(),
    "cascade": cascade,
    **{name: partial(lambda fit: fit(natural()), fit) for name, fit in DETECTORS.items()},
}
"""Rows for which something is trained here."""


class Classes(nn.Module):
    """The logits of the classes, without that of the rejection: what a paper of its time attacked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[:, :-1]


class Opaque(nn.Module):
    """A model that shows neither layers nor declarations."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["hidden"] = model

    def forward(self, x: Tensor) -> Tensor:
        return self.__dict__["hidden"](x)


def subjects(only: list[str]) -> dict[str, Callable[[], nn.Module]]:
    """Every row of the table by name."""

    def behind(text: str, net: str) -> Callable[[], nn.Module]:
        return lambda: defenses.parse(text)(copy.deepcopy(models.load(f"bundled:{net}"))).eval()

    rows: dict[str, Callable[[], nn.Module]] = {"no defense": lambda: models.load("bundled:fashion-natural")}
    rows |= {text: behind(text, "fashion-natural") for text in SINGLE}
    rows |= {
        name: behind(text, "fashion-natural") if text else rows["no defense"] for name, (text, _) in PATCHES.items()
    }
    rows |= LEARNT
    rows["robust net"] = lambda: models.load("bundled:fashion-pgd")
    rows["robust net, jpeg:75"] = behind("jpeg:75", "fashion-pgd")
    for text in only:
        if text not in rows:
            rows[text] = behind(text, "fashion-natural")
    return {name: make for name, make in rows.items() if not only or name in only}


def by_hand(model: nn.Module, data: Dataset, threat: Threat, *, honest: bool) -> Tensor:
    """Who survives one PGD: naive, or with what an honest attacker of this defense would use."""
    said = defenses.declared(model)
    reject = _rejects(model, data)
    if reject is not None and not honest:
        bare = Classes(model).eval()
        x = mohs.attack(
            PGD(steps=40, objective=plain_cross_entropy), bare, data.x, data.y, threat, stop=mohs.Stop.BUDGET
        ).x
        with torch.no_grad():
            answer = model(x).argmax(1)
        held = (answer == data.y) | (answer == reject)
        return held & _right(model, data, threat)
    attack: Any = PGD(steps=100) if honest else PGD(steps=40, objective=plain_cross_entropy)
    if honest and threat.region.kind == "patch":
        attack = LaVAN(steps=100)
    try:
        out = mohs.attack(
            attack, model, data.x, data.y, threat, guide=said.guide if honest else None, average=10 if honest and said.random else 1,
            reject=reject,
        )  # fmt: skip
    except mohs.errors.ModelError as error:
        if honest or "gradient" not in str(error):
            raise
        return _right(model, data, threat)  # no gradient at all: what such a paper would have called robust
    broken = out.success
    if threat.draws:  # as an evaluation confirms what its attacks report
        broken &= mohs.evaluation.confirm(model, out.x, data.y, threat, reject=reject)
    return ~broken & _right(model, data, threat)


def _rejects(model: nn.Module, data: Dataset) -> int | None:
    with torch.no_grad():
        return model(data.x[:1]).shape[1] - 1 if defenses.declared(model).rejects else None


def _right(model: nn.Module, data: Dataset, threat: Threat) -> Tensor:
    """Who is right without an attack, by majority of the draws."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        looks = [torch.cat([model(x).argmax(1) for x in data.x.split(256)]) for _ in range(max(threat.draws, 1))]
    return (torch.stack(looks) == data.y).double().sum(0) * 2 > max(threat.draws, 1)


def row(name: str, make: Callable[[], nn.Module], data: Dataset, plan: str, keep: Path | None = None) -> dict[str, Any]:
    """One line of the table; with ``keep`` its two records stay in that folder, where a run that was stopped goes on."""
    place = None if keep is None else keep / "".join(c if c.isalnum() else "-" for c in name)
    model = make()
    random = defenses.declared(model).random
    threat = PATCHES[name][1] if name in PATCHES else THREAT
    threat = Threat(threat.region, draws=DRAWS) if random else threat
    said = mohs.evaluate(model, data, threat, plan=plan, control=0, out=place and place / "declared")
    hidden = mohs.evaluate(
        Opaque(make()).eval(), data, threat, plan=plan, control=0, adaptive="blind", reject=_rejects(model, data),
        out=place and place / "withheld",
    )  # fmt: skip
    naive = by_hand(model, data, threat, honest=False)
    chosen = next((t for t in hidden.header.tactics if t.chosen), None)
    kinds = [chosen.against] if chosen is not None and chosen.against else []
    return {
        "defense": name, "clean": _share(_right(model, data, threat)), "naive": _share(naive),
        "hand-made": _share(naive & by_hand(model, data, threat, honest=True)), "declared": said.robust_accuracy,
        "withheld": hidden.robust_accuracy,
        "type": ", ".join(dict.fromkeys([*kinds, *(["stochastic"] if random else [])])) or "none",
        "through": "as they are" if chosen is None else chosen.name,
        "checks": [f.id for f in hidden.header.checks if f.severity in ("warn", "block")],
        "published": PUBLISHED.get(name, ""), "expected": name in EXPECTED,
    }  # fmt: skip


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())


def outcome(found: dict[str, Any], bare: dict[Threat, float]) -> str:
    """Was the row expected to fall to within two points of the undefended net, and did it? ``bare`` is filled by the rows without
    a defense, which come first."""
    name, left = found["defense"], max(found["declared"], found["withheld"])
    threat = PATCHES[name][1] if name in PATCHES else THREAT
    if name.startswith("no defense"):
        bare[threat] = left
    if name.startswith("robust net"):
        return "kept" if left >= found["naive"] - 0.2 and left > 0.5 else "LOST"
    if not found["expected"]:
        return "-"
    if threat not in bare:
        return "to fall"
    return "fell" if left <= bare[threat] + 0.02 else "MISSED"


def main() -> None:
    """Print the table; rows appear as they are ready."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--plan", default="standard")
    parser.add_argument("--only", action="append", default=[], help="a row's name, or a defense as --defense takes it")
    parser.add_argument("--out", type=Path, help="the rows as JSON")
    parser.add_argument("--keep", type=Path, help="a folder for the records, in which a run that was stopped goes on")
    given = parser.parse_args()
    data, rows = load("bundled:fashion-mnist", n=given.rows), []
    bare: dict[Threat, float] = {}
    print(
        "| defense | clean | naive | hand-made | declared | withheld | expected | obfuscation | through; checks | published |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, make in subjects(given.only).items():
        rows.append(
            found := row(name, make, data.take(min(len(data), FEWER.get(name, len(data)))), given.plan, given.keep)
        )
        found["outcome"] = outcome(found, bare)
        shares = " | ".join(f"{found[key]:.1%}" for key in ("clean", "naive", "hand-made", "declared", "withheld"))
        print(
            f"| {name} | {shares} | {found['outcome']} | {found['type']} | {found['through']}; {', '.join(found['checks'])} | "
            f"{found['published']} |",
            flush=True,
        )
    if given.out:
        given.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

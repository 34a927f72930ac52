"""Every defense with settings under which it can stand before a small net, and the nets and images for it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

import mohs
from mohs import defenses
from mohs.defenses import Defense

TRANSFORMS: dict[str, Defense] = {
    "bit-depth": defenses.BitDepth(3),
    "jpeg": defenses.JPEG(75),
    "gaussian-blur": defenses.GaussianBlur(1.0),
    "mean-blur": defenses.MeanBlur(3),
    "median-blur": defenses.MedianBlur(3),
    "noise-input": defenses.NoiseInput(0.1),
    "random-resize-pad": defenses.RandomResizePad(0.9),
    "total-variation": defenses.TotalVariation(0.7, rounds=2),
    "non-local-means": defenses.NonLocalMeans(0.05, search=3),
    "local-gradients-smoothing": defenses.LocalGradientsSmoothing(block=5, overlap=2),
}
OTHERS: dict[str, Defense] = {
    "crop-ensemble": defenses.CropEnsemble(3, 0.9),
    "activation-pruning": defenses.ActivationPruning(),
    "digital-watermarking": defenses.DigitalWatermarking(),
    "pixel-defend": defenses.PixelDefend(),
    "defense-gan": defenses.DefenseGAN(steps=5, starts=2),
    "bounded-relu": defenses.BoundedReLU(2.0),
    "weight-pruning": defenses.WeightPruning(0.8),
    "quantisation": defenses.Quantisation(4),
    "defensive-perturbation": defenses.DefensivePerturbation(torch.full((1, 28, 28), 0.05)),
}
CONTROLS: dict[str, Defense] = {
    "gradient-noise": defenses.GradientNoise(),
    "gradient-truncation": defenses.GradientTruncation(),
    "detach": defenses.Detach(),
    "logit-rounding": defenses.LogitRounding(1),
    "logit-scale": defenses.LogitScale(),
    "double-softmax": defenses.DoubleSoftmax(),
    "k-winners": defenses.KWinners(0.3),
}
ENSEMBLES: dict[str, Defense] = {
    "mean-logits": defenses.MeanLogits(),
    "mean-probabilities": defenses.MeanProbabilities(),
    "majority-vote": defenses.MajorityVote(),
    "reject-disagreement": defenses.RejectDisagreement(),
}


@functools.cache
def fashion(n: int = 64) -> tuple[Tensor, Tensor]:
    data = mohs.data.load("bundled:fashion-mnist", n=n)
    return data.x, data.y


@functools.cache
def net(name: str = "natural") -> nn.Module:
    """One of the bundled nets; tests must leave it as it is."""
    return mohs.models.load(f"bundled:fashion-{name}")


def quilting() -> Defense:
    return defenses.Quilting.of(fashion()[0], patches=300, neighbours=3)


def thermometer_net(levels: int) -> nn.Module:
    """A small net on the code of ``levels``, with weights that no training has seen."""
    torch.manual_seed(levels)
    return mohs.models.nets.small_cnn(channels=levels).eval()


@functools.cache
def detectors() -> dict[str, nn.Module]:
    """All detectors around the natural net, fitted on a few images with settings that keep the fit short."""
    x, y = fashion(1000)
    changed = mohs.attack(mohs.attacks.FGSM(), net(), x[:100], y[:100], "linf:0.1")
    pairs = (changed.x, changed.success)
    planted = defenses.Trapdoor(side=5, strength=1.0, epochs=12, lr=0.005, fpr=0.3)
    squeezers = (defenses.BitDepth(4), defenses.MedianBlur(3))
    return {
        "lid": defenses.LID(k=5, references=40).fit(net(), x[:100], *pairs),
        "mahalanobis": defenses.Mahalanobis().fit(net(), x[:100], y[:100], *pairs),
        "binary-detector": defenses.BinaryDetector(width=4, epochs=2).fit(net(), x[:100], *pairs),
        "trapdoor": planted.fit(net(), x[:400], y[:400]),
        "feature-squeezing": defenses.FeatureSqueezing(squeezers).fit(net(), x[:300]),
        "magnet": defenses.MagNet(steps=20).fit(net(), x[:300]),
        # as many again by turning them over
        "pca-whitening": defenses.PCAWhitening().fit(net(), torch.cat([x, x.flip(-1)])),
    }


def every() -> dict[str, nn.Module]:
    """All defenses of the registry and all detectors, each around a net that fits it."""
    made = {name: defense(net()) for name, defense in (TRANSFORMS | OTHERS | CONTROLS).items()}
    made |= {name: defense(net(), net("pgd"), net()) for name, defense in ENSEMBLES.items()}
    made["quilting"] = quilting()(net())
    made["thermometer"] = defenses.Thermometer(4)(thermometer_net(4))
    return made | detectors()

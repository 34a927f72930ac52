"""Defenses: at inference time, one file per method; ``training`` holds those that are trained.

``GradientNoise``, ``GradientTruncation``, ``Detach``, ``LogitRounding``, ``LogitScale``, ``DoubleSoftmax`` and ``KWinners`` are
negative controls: they hide gradients and add no robustness. An evaluation that does not see through them is not one.
"""

from __future__ import annotations

from collections.abc import Iterable

from mohs.defenses._base import Declaration, Defended, Defense, Honest, Stack, declared
from mohs.defenses._detector import Detector
from mohs.defenses._parse import parse_with
from mohs.defenses.activation_pruning import ActivationPruning
from mohs.defenses.binary_detector import BinaryDetector
from mohs.defenses.bit_depth import BitDepth
from mohs.defenses.bounded_relu import BoundedReLU
from mohs.defenses.crop_ensemble import CropEnsemble
from mohs.defenses.defense_gan import DefenseGAN
from mohs.defenses.defensive_perturbation import DefensivePerturbation
from mohs.defenses.detach import Detach
from mohs.defenses.digital_watermarking import DigitalWatermarking
from mohs.defenses.double_softmax import DoubleSoftmax
from mohs.defenses.dynamic_adversary import DynamicAdversary
from mohs.defenses.feature_squeezing import FeatureSqueezing
from mohs.defenses.gaussian_blur import GaussianBlur
from mohs.defenses.gradient_noise import GradientNoise
from mohs.defenses.gradient_truncation import GradientTruncation
from mohs.defenses.jpeg import JPEG
from mohs.defenses.kwinners import KWinners
from mohs.defenses.lid import LID
from mohs.defenses.local_gradients_smoothing import LocalGradientsSmoothing
from mohs.defenses.logit_rounding import LogitRounding
from mohs.defenses.logit_scale import LogitScale
from mohs.defenses.magnet import MagNet
from mohs.defenses.mahalanobis import Mahalanobis
from mohs.defenses.majority_vote import MajorityVote
from mohs.defenses.mean_blur import MeanBlur
from mohs.defenses.mean_logits import MeanLogits
from mohs.defenses.mean_probabilities import MeanProbabilities
from mohs.defenses.median_blur import MedianBlur
from mohs.defenses.noise_input import NoiseInput
from mohs.defenses.non_local_means import NonLocalMeans
from mohs.defenses.pca_whitening import PCAWhitening
from mohs.defenses.pixel_defend import PixelDefend
from mohs.defenses.quantisation import Quantisation
from mohs.defenses.quilting import Quilting
from mohs.defenses.random_resize_pad import RandomResizePad
from mohs.defenses.reject_disagreement import RejectDisagreement
from mohs.defenses.thermometer import Thermometer
from mohs.defenses.total_variation import TotalVariation
from mohs.defenses.trapdoor import Trapdoor
from mohs.defenses.weight_pruning import WeightPruning

REGISTRY: dict[str, type[Defense]] = {
    "bit-depth": BitDepth,
    "jpeg": JPEG,
    "gaussian-blur": GaussianBlur,
    "mean-blur": MeanBlur,
    "median-blur": MedianBlur,
    "noise-input": NoiseInput,
    "random-resize-pad": RandomResizePad,
    "crop-ensemble": CropEnsemble,
    "total-variation": TotalVariation,
    "non-local-means": NonLocalMeans,
    "quilting": Quilting,
    "pixel-defend": PixelDefend,
    "defense-gan": DefenseGAN,
    "thermometer": Thermometer,
    "activation-pruning": ActivationPruning,
    "bounded-relu": BoundedReLU,
    "weight-pruning": WeightPruning,
    "quantisation": Quantisation,
    "defensive-perturbation": DefensivePerturbation,
    "local-gradients-smoothing": LocalGradientsSmoothing,
    "digital-watermarking": DigitalWatermarking,
    "mean-logits": MeanLogits,
    "mean-probabilities": MeanProbabilities,
    "majority-vote": MajorityVote,
    "reject-disagreement": RejectDisagreement,
    "gradient-noise": GradientNoise,
    "gradient-truncation": GradientTruncation,
    "detach": Detach,
    "logit-rounding": LogitRounding,
    "logit-scale": LogitScale,
    "double-softmax": DoubleSoftmax,
    "k-winners": KWinners,
}
"""Every defense by the name the command line knows it by."""

DETECTORS: dict[str, type[Detector]] = {
    "lid": LID,
    "mahalanobis": Mahalanobis,
    "binary-detector": BinaryDetector,
    "trapdoor": Trapdoor,
    "feature-squeezing": FeatureSqueezing,
    "magnet": MagNet,
    "pca-whitening": PCAWhitening,
}
"""Those that learn from data what is usual, and reject the rest: ``MagNet().fit(model, x)`` is the defended model."""


def parse(text: str | Iterable[str]) -> Defense:
    """The defense that a text names: ``jpeg:75``, or several, in the order in which data pass through them.

    Settings follow the name in their order, or by name: ``crop-ensemble:10:0.8``, ``crop-ensemble:share=0.8``. Several defenses
    are separated by commas, or given as several texts; the answer is then a ``Stack``.

    Args:
        text: one text, or several.

    Raises:
        UsageError: no such defense or setting, or a value that cannot be; the message says the form.

    >>> parse("jpeg:75"), parse("noise-input:8/255").sigma < 0.04
    (JPEG(quality=75), True)
    >>> parse("bit-depth:4, jpeg").defenses
    (BitDepth(bits=4), JPEG(quality=75))
    """
    return parse_with(REGISTRY, text)


__all__ = [
    "DETECTORS",
    "REGISTRY",
    "ActivationPruning",
    "BinaryDetector",
    "BitDepth",
    "BoundedReLU",
    "CropEnsemble",
    "Declaration",
    "Defended",
    "Defense",
    "DefenseGAN",
    "DefensivePerturbation",
    "Detach",
    "Detector",
    "DigitalWatermarking",
    "DoubleSoftmax",
    "DynamicAdversary",
    "FeatureSqueezing",
    "GaussianBlur",
    "GradientNoise",
    "GradientTruncation",
    "Honest",
    "JPEG",
    "KWinners",
    "LID",
    "LocalGradientsSmoothing",
    "LogitRounding",
    "LogitScale",
    "MagNet",
    "Mahalanobis",
    "MajorityVote",
    "MeanBlur",
    "MeanLogits",
    "MeanProbabilities",
    "MedianBlur",
    "NoiseInput",
    "NonLocalMeans",
    "PCAWhitening",
    "PixelDefend",
    "Quantisation",
    "Quilting",
    "RandomResizePad",
    "RejectDisagreement",
    "Stack",
    "Thermometer",
    "TotalVariation",
    "Trapdoor",
    "WeightPruning",
    "declared",
    "parse",
]

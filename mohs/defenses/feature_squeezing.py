"""Detection by feature squeezing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mohs.defenses._agreement import total_variation, unsaturated
from mohs.defenses._base import Defended, Defense, Switch
from mohs.defenses._detector import Detector, calibrated, check_mode
from mohs.defenses._settings import number
from mohs.defenses.bit_depth import BitDepth
from mohs.defenses.median_blur import MedianBlur
from mohs.defenses.non_local_means import NonLocalMeans
from mohs.errors import UsageError
from mohs.guide import instead
from mohs.target import classify


class SqueezingState(Switch):
    """The squeezers, each as a module that an honest attacker switches to its stand-in, and the threshold."""

    def __init__(self, squeezers: tuple[Defense, ...], like: Tensor) -> None:
        super().__init__()
        self.squeezers = nn.ModuleList(Defended(squeezer, nn.Identity()) for squeezer in squeezers)
        self.register_buffer("threshold", like.new_zeros(()))


@dataclass(frozen=True)
class FeatureSqueezing(Detector):
    """Rejects inputs whose answer changes once they are squeezed: rounded, blurred or denoised.

        score = max_i | softmax f(x) - softmax f(s_i(x)) |_1,   0 to 2

    Clean images keep their answer when small detail goes, and an adversarial change that ignores the detector is often such
    detail. One that fools the net on the image and on its squeezed versions alike passes: that is one more term in the attack.
    Squeezers that round stand aside going back as they declare; where two answers are sure of different classes, the gradient is
    that at a higher temperature.

    Args:
        squeezers: defenses that change the input by a fixed rule, such as ``BitDepth``, ``MedianBlur`` and ``NonLocalMeans``.
        fpr: share of clean inputs to reject, above 0 and below 1; the threshold is an order statistic of the clean examples.

    Raises:
        DataError: too few examples for a threshold that holds its rate (19 at 0.05), or scores that are not finite.
        UsageError: called before ``fit``; squeezers that are no fixed changes of the input; a model in training mode.

    Cost: a pass of the model for the input and one for each squeezer.

    >>> import mohs
    >>> from mohs.defenses import BitDepth, FeatureSqueezing, MedianBlur
    >>> net, data = mohs.models.load("bundled:fashion-natural"), mohs.data.load("bundled:fashion-mnist", n=240)
    >>> guarded = FeatureSqueezing((BitDepth(4), MedianBlur(3))).fit(net, data.x)
    >>> int((guarded(data.x).argmax(1) == 10).sum())  # rejected: a twentieth of 240 at most
    11

    **Differs from the paper**: windows of the median have a middle, so 3 x 3 instead of 2 x 2, and the non-local means are those of
    ``NonLocalMeans``. The defaults are those for colour images; for MNIST the paper rounds to one bit and takes the median.
    **Source**: W. Xu, D. Evans, Y. Qi, "Feature squeezing: detecting adversarial examples in deep neural networks", NDSS 2018, the
    section on detection (joint detection); how it fell: W. He, J. Wei, X. Chen, N. Carlini, D. Song, "Adversarial example defenses:
    ensembles of weak defenses are not strong", WOOT 2017.
    """

    squeezers: tuple[Defense, ...] = (BitDepth(5), MedianBlur(3), NonLocalMeans())
    fpr: float = 0.05
    smooth: ClassVar[bool] = False

    def __post_init__(self) -> None:
        number(self.fpr, "fpr of FeatureSqueezing", 0, 1, above=True, below=True)
        if not isinstance(self.squeezers, tuple) or not self.squeezers:
            raise UsageError(
                f"squeezers of FeatureSqueezing must be one or more defenses in a tuple; got {self.squeezers!r}. Give such as "
                "(BitDepth(5), MedianBlur(3))."
            )
        for squeezer in self.squeezers:
            if not _fixed(squeezer):
                raise UsageError(
                    "A squeezer of FeatureSqueezing must be a defense that changes the input, without chance, and nothing else; got "
                    f"{squeezer!r}. Give such as BitDepth, JPEG, MedianBlur, GaussianBlur or NonLocalMeans."
                )

    def fit(self, model: nn.Module, x: Tensor) -> Defended:
        """The model with a detector whose threshold comes from clean inputs [N, ...], which must not be those it is tested on."""
        check_mode(model, "FeatureSqueezing")
        for squeezer in self.squeezers:
            shape = tuple(squeezer.transform(x[:1]).shape[1:])
            if shape != x.shape[1:]:
                raise UsageError(
                    f"The model is asked about squeezed inputs as about others, so a squeezer must keep their shape; {squeezer!r} "
                    f"makes {shape} of {tuple(x.shape[1:])}. Leave it out."
                )
        state = SqueezingState(self.squeezers, x)
        state.threshold = calibrated(self._scored(model, state, x), self.fpr, "FeatureSqueezing")
        return self.fitted(model, state)

    def score(self, classifier: nn.Module, state: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K] and the largest L1 distance of probabilities [B], 0 to 2."""
        logits = classify(classifier, x)
        others = [classify(classifier, squeezer(x)) for squeezer in state.squeezers]
        value, which = torch.stack([total_variation(logits, z) for z in others]).max(0)
        if state.guiding:
            each = torch.stack([total_variation(*unsaturated(logits, z)) for z in others])
            value = instead(value, each.gather(0, which.unsqueeze(0)).squeeze(0))
        return logits, value


def _fixed(squeezer: object) -> bool:
    """Is it a defense that is its ``transform``, without chance?"""
    return (
        isinstance(squeezer, Defense)
        and type(squeezer).transform is not Defense.transform
        and type(squeezer).answer is Defense.answer
        and not squeezer.random
    )

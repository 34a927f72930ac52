"""A classifier with a detector: what is shared by all that reject an input on a score."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mohs.defenses._base import Defended, Defense, rejecting
from mohs.errors import DataError, UsageError
from mohs.target import classify

BATCH = 256
"""Examples that are looked at together where no caller says how many."""
HELD = 0.25
"""Share of the clean examples that only the threshold comes from."""


class Detector(Defense, ABC):
    """Rejects the inputs whose score is above a threshold; a subclass has ``fit`` and ``score``.

    The logits [B, K + 1] are those of the classifier and, for the rejection, their largest plus the score's excess over the
    threshold. So the input is rejected where the score is above it, unless the excess is lost in the rounding of the logits. One
    differentiable objective serves an attack that has to fool the classifier and to pass the detector: where it does one of the
    two already, the margin is that of the other; where it does neither, what both lack adds up. Around a classifier that rejects by
    itself there is one rejection, the larger of both.

    A score may depend on the answer, [B, K]; then that of the class with the highest logit decides. The logit of each class is
    lowered by what its own excess has more than the answer's, which changes no answer. Without that, the margin would jump where
    one class gives way to another, and an attack would climb to the brink of a class that is going to be rejected.

    ``taught_by``: the arguments of ``fit`` after the model, for the message that asks for it.
    """

    rejects: ClassVar[bool] = True
    smooth: ClassVar[bool] = True
    taught_by: ClassVar[str] = "x"

    def __call__(self, *models: nn.Module) -> nn.Module:
        """Raises: there is no detector before ``fit``."""
        raise UsageError(
            f"{type(self).__name__} learns what is usual from data, so it cannot defend a model by itself. Call "
            f"{type(self).__name__}(...).fit(model, {self.taught_by}), which returns the defended model."
        )

    def fitted(self, model: nn.Module, state: nn.Module) -> Defended:
        """The classifier together with what was learnt."""
        whole = nn.ModuleDict({"classifier": model, "detector": state.train(model.training)})
        whole.training = model.training
        return Defended(self, whole)

    def answer(self, model: nn.Module, x: Tensor, guiding: bool) -> Tensor:
        """Logits [B, K + 1]."""
        classifier, state = self._parts(model)
        logits, score = self.score(classifier, state, x)
        already = logits[:, -1] if rejecting(classifier) else None
        logits = logits if already is None else logits[:, :-1]
        excess = score - state.threshold
        own = of_answer(excess, logits)
        rejection = logits.amax(1) + own
        if excess.dim() == 2:
            logits = logits + (own.clamp_min(0).unsqueeze(1) - excess.clamp_min(0))
        rejection = rejection if already is None else torch.maximum(rejection, already)
        return torch.cat([logits, rejection.unsqueeze(1)], 1)

    @abstractmethod
    def score(self, classifier: nn.Module, state: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the classifier answers, logits [B, K], and how unusual each input is, [B], or is as a member of each class, [B, K];
        differentiable."""

    def scores(self, model: nn.Module, x: Tensor, batch: int = BATCH) -> Tensor:
        """Scores [N] of inputs by a model that ``fit`` returned, without gradients; above its threshold they are rejected.

        Where the score depends on the answer, it is that of the answer.
        """
        if not isinstance(model, Defended) or model.defense is not self:
            raise UsageError(
                f"scores() needs the model that this {type(self).__name__}.fit returned; got {type(model).__name__}."
            )
        return self._scored(*self._parts(model.model), x, batch)

    def _scored(self, classifier: nn.Module, state: Any, x: Tensor, batch: int = BATCH) -> Tensor:
        found = []
        with torch.no_grad():
            for part in x.split(batch):
                logits, score = self.score(classifier, state, part)
                found.append(of_answer(score, logits))
        return torch.cat(found)

    @staticmethod
    def _parts(model: nn.Module) -> tuple[nn.Module, Any]:
        assert isinstance(model, nn.ModuleDict)
        return model["classifier"], model["detector"]


def of_answer(values: Tensor, logits: Tensor) -> Tensor:
    """Values [B] themselves; of values [B, K] those of the class with the highest logit, [B]."""
    return values if values.dim() == 1 else values.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)


def threshold_at(scores: Tensor, fpr: float) -> float:
    """The score that at most a share ``fpr`` of further inputs like these exceeds on average: an order statistic.

    Of n + 1 exchangeable scores the last is above the k-th smallest of the others with probability at most 1 - k / (n + 1).
    """
    ranked, n = scores.sort().values, len(scores)
    k = _rank(n, fpr)
    return float(ranked[k - 1]) if k <= n else math.inf


def calibrated(scores: Tensor, fpr: float, what: str) -> Tensor:
    """``threshold_at`` as a tensor like the scores [n] of clean examples.

    Raises:
        DataError: scores that are not finite, or too few to promise so small a rate.
    """
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise DataError(
            f"{what} chooses its threshold by the scores of clean examples; {len(bad)} of {len(scores)} are not finite, the first is "
            f"number {bad[0]} of them. Does the model answer with finite logits there?"
        )
    if len(scores) < least(fpr):
        raise DataError(
            f"{what} needs at least {least(fpr)} clean examples for a threshold that rejects a share of {fpr:g}; {len(scores)} were "
            "left for it. Give more, or a larger fpr."
        )
    return scores.new_tensor(threshold_at(scores, fpr))


def least(fpr: float) -> int:
    """The fewest examples whose order statistics hold this rate.

    >>> least(0.05), least(0.1)
    (19, 9)
    """
    return next(n for n in itertools.count(max(1, int(1 / fpr) - 2)) if _rank(n, fpr) <= n)


def held_out(x: Tensor, fpr: float, what: str, seed: int) -> tuple[Tensor, Tensor]:
    """Clean examples [N, ...] by chance in two: those to learn from, and a quarter that only the threshold comes from.

    Raises:
        DataError: too few for a threshold that holds its rate.
    """
    held = int(HELD * len(x))
    if held < least(fpr):
        raise DataError(
            f"{what} holds a quarter of its clean examples out, at least {least(fpr)} for a threshold that rejects a share of "
            f"{fpr:g}; got {len(x)} in all. Give {math.ceil(least(fpr) / HELD)} or more, or a larger fpr."
        )
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    return x[order[held:]], x[order[:held]]


def _rank(n: int, fpr: float) -> int:
    return math.ceil((1 - fpr) * (n + 1))


def flat(value: Tensor) -> Tensor:
    """What a layer answers, [B, ...], as rows of numbers [B, D]."""
    return value.flatten(1)


def activations(
    model: nn.Module, names: Sequence[str], x: Tensor, form: Callable[[Tensor], Tensor] = flat
) -> tuple[Tensor, list[Tensor]]:
    """Logits, and what the named layers answer, each in this ``form``; differentiable."""
    seen: dict[str, Tensor] = {}
    with _listening(model, names, lambda name, value: seen.__setitem__(name, form(value))):
        logits = classify(model, x)
    missing = [name for name in names if name not in seen]
    if missing:
        raise UsageError(f"The layers {', '.join(missing)} were not used in a forward pass; give others.")
    return logits, [seen[name] for name in names]


def weighted(model: nn.Module) -> list[str]:
    """Names of the leaf layers that have weights, in order: those whose answers a detector looks at by default.

    Raises:
        UsageError: the model shows none.
    """
    names = [n for n, m in model.named_modules() if n and not list(m.children()) and hasattr(m, "weight")]
    if not names:
        raise UsageError(
            "The model shows no layers, and the detector looks at what layers answer. Give a torch module."
        )
    return names


def check_mode(model: nn.Module, what: str) -> None:
    """Refuse a model in training mode: activations would depend on the batch or on chance, and looking would change it.

    Raises:
        UsageError: a module of the model trains.
    """
    for name, module in model.named_modules():
        if module.training and isinstance(module, nn.modules.batchnorm._NormBase | nn.modules.dropout._DropoutNd):
            raise UsageError(
                f"{what} looks at a model in eval mode; got one in training mode ({name or 'model'}: {type(module).__name__}). Call "
                "model.eval() first; Mohs does not flip modes behind your back."
            )


@contextmanager
def _listening(model: nn.Module, names: Sequence[str], tell: Callable[[str, Tensor], None]) -> Iterator[None]:
    layers = dict(model.named_modules())
    unknown = [name for name in names if name not in layers]
    if unknown:
        raise UsageError(f"The model has no layer {unknown[0]!r}. It has: {', '.join(n for n in layers if n)}.")

    def hook(name: str) -> Callable[..., None]:
        def heard(_: nn.Module, __: Any, value: Tensor) -> None:
            tell(name, value)

        return heard

    handles = [layers[name].register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""A classifier with a detector: what is shared by all that reject an input on a score."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mohs.defenses._base import Defended, Defense
from mohs.errors import UsageError
from mohs.target import classify


class Detector(Defense, ABC):
    """Rejects the inputs whose score is above a threshold; a subclass has ``fit`` and ``score``.

    The logits [B, K + 1] are those of the classifier and, for the rejection, their largest plus the score's excess over the
    threshold. So the input is rejected where the score is above it, unless the excess is lost in the rounding of the logits. One
    differentiable objective serves an attack that has to fool the classifier and to pass the detector: where it does one of the
    two already, the margin is that of the other; where it does neither, what both lack adds up.
    """

    rejects: ClassVar[bool] = True
    smooth: ClassVar[bool] = True

    def __call__(self, *models: nn.Module) -> nn.Module:
        """Raises: there is no detector before ``fit``."""
        raise UsageError(
            f"{type(self).__name__} learns what is usual from data, so it cannot defend a model by itself. Call "
            f"{type(self).__name__}(...).fit(model, x, changed), which returns the defended model."
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
        excess = score - state.threshold
        return torch.cat([logits, (logits.amax(1) + excess).unsqueeze(1)], 1)

    @abstractmethod
    def score(self, classifier: nn.Module, state: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K] and how unusual each input is [B]; differentiable."""

    def scores(self, model: nn.Module, x: Tensor, batch: int = 256) -> Tensor:
        """Scores [N] of inputs by a model that ``fit`` returned, without gradients; above its threshold they are rejected."""
        if not isinstance(model, Defended) or model.defense is not self:
            raise UsageError(
                f"scores() needs the model that this {type(self).__name__}.fit returned; got {type(model).__name__}."
            )
        classifier, state = self._parts(model.model)
        with torch.no_grad():
            return torch.cat([self.score(classifier, state, part)[1] for part in x.split(batch)])

    @staticmethod
    def _parts(model: nn.Module) -> tuple[nn.Module, Any]:
        assert isinstance(model, nn.ModuleDict)
        return model["classifier"], model["detector"]


def threshold_at(scores: Tensor, fpr: float) -> float:
    """The score that at most a share ``fpr`` of further inputs like these exceeds on average: an order statistic.

    Of n + 1 exchangeable scores the last is above the k-th smallest of the others with probability at most 1 - k / (n + 1).
    """
    ranked, n = scores.sort().values, len(scores)
    k = math.ceil((1 - fpr) * (n + 1))
    return float(ranked[k - 1]) if k <= n else math.inf


def activations(model: nn.Module, names: Sequence[str], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and what the named layers answer, [B, D] each; differentiable."""
    seen: dict[str, Tensor] = {}
    with _listening(model, names, lambda name, value: seen.__setitem__(name, value.flatten(1))):
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

"""A needle that is there: a second classifier on a model's features whose only known success is one planted point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mohs import streams
from mohs.attacks import APGD, Stop, attack
from mohs.errors import ModelError
from mohs.evaluation._batches import padded
from mohs.evaluation._quiet import untouched
from mohs.objectives import margin
from mohs.regions import Linf
from mohs.target import classify, rounding
from mohs.threat import Access, Threat

GAP = 0.05
"""Inner points stay within 1 - GAP of the radius."""
CLOSENESS = 0.999
"""How far the threshold is moved from the highest inner point (0) to the needle (1)."""
SEARCH = APGD(steps=50, objective=margin)
"""What looks for a higher point than the random one, so that the exam is not passed by whatever moves at all."""
TRIES = 4
"""Draws of inner points and needle before an example is given up."""


class Untestable(Exception):
    """Why no needle can be hidden near an example."""


class Binarised(nn.Module):
    """The features of ``model`` with a head of two classes in place of its own: 0 for inner points, 1 for the needle.

    Its modules have the names they have in ``model``, so that a guide built by name fits both.

    Args:
        model: the classifier under test; it is called as it is.
        layer: the last linear layer, whose input are the features; None: the logits are.
        center, weight: of the head, [D].
        offset: added to the score.
        level: what both logits have in common.
    """

    _exam_model: nn.Module
    _exam_center: Tensor
    _exam_weight: Tensor

    def __init__(
        self, model: nn.Module, layer: str | None, center: Tensor, weight: Tensor, offset: float, level: float
    ) -> None:
        super().__init__()
        # before the model itself, so that named_modules() meets them under the names they have there
        for name, child in model.named_children():
            self._modules[name] = child
        self._modules["_exam_model"] = model
        self._exam_layer, self._exam_offset, self._exam_level = layer, offset, level
        self.register_buffer("_exam_center", center)
        self.register_buffer("_exam_weight", weight)
        self.training = model.training  # not train(), which would set the modes of the model's own layers

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 2]."""
        features = look_inside(self._exam_model, self._exam_layer, x)[0]
        # centred first: the differences that decide are small beside the features themselves
        score = (features.to(self._exam_center) - self._exam_center) @ self._exam_weight + self._exam_offset
        return torch.stack([self._exam_level - score, self._exam_level + score], 1)


@contextmanager
def _watching(layers: dict[str, nn.Module], note: Callable[[str, Any], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, inputs: note(name, inputs[0] if inputs else None)

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def look_inside(model: nn.Module, layer: str | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """(features [B, D], logits [B, K]) of inputs [B, ...]; one forward."""
    seen: list[Tensor] = []
    watched = {} if layer is None else {layer: model.get_submodule(layer)}
    with _watching(watched, lambda _, value: seen.append(value)):
        logits = classify(model, x)
    return (logits if layer is None else seen[-1].flatten(1)), logits


def last_linear(model: nn.Module, x: Tensor) -> str | None:
    """Name of the ``nn.Linear`` that is called last with one row per input, or None; one forward."""
    order: list[str] = []

    def note(name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.dim() >= 2 and len(value) == len(x):
            order.append(name)

    layers: dict[str, nn.Module] = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    with torch.no_grad(), _watching(layers, note):
        classify(model, x)
    return order[-1] if order else None


@dataclass
class Hidden:
    """An example with a needle near it.

    ``model`` is the binarised classifier, ``x`` [1, ...] the example (class 0), ``needle`` [1, ...] a point of region and box
    of class 1, ``inner`` [M, ...] points of class 0 (kept on request), ``lucky`` whether one of the random looks was class 1.
    """

    model: Binarised
    x: Tensor
    needle: Tensor
    lucky: bool
    dimension: int
    inner: Tensor | None = None


@dataclass(frozen=True)
class Hider:
    """How needles are hidden: one classifier, one threat, one configuration.

    Args:
        model, layer, threat: see ``Binarised``.
        inner: inner points, the example among them.
        reach: the threshold's place between the highest inner point (0) and the best one that a search knows (1); None:
            just below the random point, as in the paper.
        looks: random points that test how hard the needle is to find by chance.
        seed: of all draws.
        batch: physical batch size.
        guide, average: what the search follows, see ``exam``.
    """

    model: nn.Module
    layer: str | None
    threat: Threat
    inner: int
    reach: float | None
    looks: int
    seed: int
    batch: int
    guide: Callable[[nn.Module], nn.Module | None] | None = None
    average: int | None = None

    def hide(self, x: Tensor, keep: bool = False) -> Hidden:
        """Hide a needle near the example x [1, ...].

        Raises:
            Untestable: no linear head tells the points apart, or there is no room for the needle.

        Cost: inner + looks + 3 forwards, and the search; more for a random model or after an unlucky draw.
        """
        reason = Untestable("")
        for attempt in range(TRIES):
            key = streams.derive(streams.content_keys(x), self.seed, streams.text_key("exam"), attempt)
            try:
                with untouched(self.model, int(key) % (1 << 63)):
                    return self._hide(x, key, keep)
            except Untestable as error:
                reason = error
        raise reason

    def _hide(self, x: Tensor, key: Tensor, keep: bool) -> Hidden:
        needle, inner = self._needle(x, key), self._inner(x, key)
        features, logits = self._look(torch.cat([inner, self._shown(needle)]))
        center, weight = fit_head(features[: len(inner)], features[len(inner) :])
        score = (features - center) @ weight
        top, aim = float(score[: len(inner)].max()), self._typical(score[len(inner) :])
        if not aim > top:
            raise Untestable("no linear head on the features tells the needle from the inner points")
        threshold = top + CLOSENESS * (aim - top)

        def head(score: np.ndarray, logits: np.ndarray) -> Binarised:
            return self._head(x, center, weight, score, logits, threshold)

        if self.reach is not None and (best := self._search(head(score, logits), x, needle)) is not None:
            seen, answers = self._look(self._shown(best))
            found = (seen - center) @ weight
            if (height := self._typical(found)) > aim:
                needle, threshold = best, max(threshold, top + self.reach * (height - top))
                score, logits = np.concatenate([score, found]), np.concatenate([logits, answers])
        model = head(score, logits)
        self._verify(model, needle, inner)
        random = self._random(x, key)
        lucky = any(bool(_won(self._ask(model, p)).any()) for p in random.split(self.batch))
        return Hidden(model, x, needle, lucky, features.shape[1], inner if keep else None)

    def _head(
        self, x: Tensor, center: np.ndarray, weight: np.ndarray, score: np.ndarray, logits: np.ndarray, threshold: float
    ) -> Binarised:  # fmt: skip
        """The head whose logits range over the points as the model's own do."""
        low, high = float(logits.min()), float(logits.max())
        half = (high - low) / 2 / float(np.abs(score - threshold).max())
        if not (math.isfinite(half) and half > 0):
            raise Untestable("the logits are the same at all points")
        return Binarised(
            self.model, self.layer, torch.from_numpy(center).to(x), torch.from_numpy(weight * half).to(x),
            -half * threshold, (low + high) / 2,
        )  # fmt: skip

    def _search(self, model: Binarised, x: Tensor, needle: Tensor) -> Tensor | None:
        """The point of the highest score that a long search from the needle meets; None where the model has no gradient."""
        own = replace(self.threat, access=Access.GRADIENT, queries=None)
        try:
            found = attack(
                SEARCH, model, x, torch.zeros(1, dtype=torch.int64, device=x.device), own, start=needle, seed=self.seed,
                stop=Stop.BUDGET, guide=None if self.guide is None else self.guide(model), average=self.average,
            )  # fmt: skip
        except ModelError:
            return None
        return found.x

    def _typical(self, score: np.ndarray) -> float:
        """Of one look itself, of several the lower quartile, so that well over half of the looks at the needle count."""
        return float(np.quantile(score, 0.25 if len(score) > 1 else 0.0))

    def _verify(self, model: Binarised, needle: Tensor, inner: Tensor) -> None:
        """Hold to the promise in the arithmetic of the attack, not only in that of the fit."""
        draws = max(self.threat.draws, 1)
        if sum(bool(_won(self._ask(model, needle))) for _ in range(draws)) * 2 <= draws:
            raise Untestable("rounding or randomness of the model hides the needle")
        if draws == 1 and any(bool(self._ask(model, p).argmax(1).any()) for p in inner.split(self.batch)):
            raise Untestable("rounding of the model moves an inner point across the boundary")

    def _shown(self, point: Tensor) -> Tensor:
        """The point as often as a random model is looked at to judge it."""
        return point.expand(max(self.threat.draws, 1), *point.shape[1:])

    def _look(self, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(features, logits) in float64."""
        parts = []
        for part in x.split(self.batch):
            with torch.no_grad():
                seen = look_inside(self.model, self.layer, padded(part, self.batch))
            parts.append([v[: len(part)].double().cpu().numpy() for v in seen])
        features, logits = (np.concatenate(v) for v in zip(*parts, strict=True))
        if not np.isfinite(features).all() or not np.isfinite(logits).all():
            raise Untestable("the features or logits are not finite")
        return features, logits

    def _ask(self, model: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(padded(x, self.batch))[: len(x)]

    def _inner(self, x: Tensor, key: Tensor) -> Tensor:
        """The example, and uniform points well inside region and box."""
        rows = self.inner - 1
        many = x.expand(rows, *x.shape[1:])
        eps = x.new_full((rows,), (1 - GAP) * self.threat.region.eps)
        return torch.cat([x, self.threat.region.start(many, eps, self.threat.box, _keys(key, 1, rows))])

    def _needle(self, x: Tensor, key: Tensor) -> Tensor:
        """One point at the full radius."""
        point = at_radius(self.threat, x, streams.derive(key, 2))
        eps = x.new_full((1,), self.threat.region.eps)
        if not bool(self.threat.region.contains(point, x, eps)):
            raise Untestable("rounding moves the needle out of the region")
        if float(self.threat.region.measure(point, x)) < (1 - GAP / 10) * self.threat.region.eps:
            raise Untestable("the box leaves no room at the full radius")
        return point

    def _random(self, x: Tensor, key: Tensor) -> Tensor:
        """Where a search without any clue would look: half of the points at the full radius, half inside."""
        outer = self.looks - self.looks // 2
        many = x.expand(self.looks, *x.shape[1:])
        keys = _keys(key, 3, self.looks)
        eps = x.new_full((self.looks - outer,), self.threat.region.eps)
        inside = self.threat.region.start(many[outer:], eps, self.threat.box, keys[outer:])
        return torch.cat([at_radius(self.threat, many[:outer], keys[:outer]), inside])


def _won(logits: Tensor) -> Tensor:
    """Does the attacker's goal, to leave class 0, count as met?"""
    return logits[:, 1] - logits[:, 0] > rounding(logits)


def _keys(key: Tensor, purpose: int, rows: int) -> Tensor:
    return streams.derive(streams.derive(key, purpose).expand(rows), torch.arange(rows, device=key.device))


def at_radius(threat: Threat, x: Tensor, keys: Tensor) -> Tensor:
    """Random points of the box at the full radius from x [B, ...]: corners of the cube, else points of the sphere.

    Where the box cuts a direction off, the rest of it is stretched until the radius is reached again, if that is possible.
    """
    region, (low, high), shape = threat.region, threat.box, tuple(x.shape[1:])
    if isinstance(region, Linf):
        change = streams.integers(keys, shape, 2).mul_(2).sub_(1).to(x).mul_(region.eps)
        return change.add_(x).clamp_(low, high)
    wide = x.double()
    direction = streams.normal(keys, shape, dtype=torch.float64)
    short, long = x.new_zeros(len(x), dtype=torch.float64), x.new_ones(len(x), dtype=torch.float64)

    def stretched(t: Tensor) -> Tensor:
        return (wide + direction * t.view(-1, *[1] * len(shape))).clamp_(low, high)

    def reached(t: Tensor) -> Tensor:
        return region.measure(stretched(t), wide) >= region.eps

    for _ in range(64):
        if bool((done := reached(long)).all()):
            break
        long = torch.where(done, long, long * 2)
    for _ in range(60):
        middle = (short + long) / 2
        far = reached(middle)
        short, long = torch.where(far, short, middle), torch.where(far, middle, long)
    return stretched(short).to(x.dtype).clamp_(low, high)


def fit_head(inner: np.ndarray, needle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(center, weight), [D] each, of an unregularised logistic regression that tells ``needle`` [M, D] from ``inner`` [N, D].

    Its constant is left to the caller. Where a linear head separates them the loss has no minimum, and its way to zero turns
    towards the widest gap; it ends when the gradient is small.
    """
    from scipy.optimize import minimize

    center = inner.mean(0)
    both = np.concatenate([needle, inner]) - center
    scale = float(np.sqrt(np.square(both).sum(1).mean())) or 1.0
    sign = np.where(np.arange(len(both)) < len(needle), 1.0, -1.0)
    signed = np.column_stack([both / scale, np.ones(len(both))]) * sign[:, None]

    def loss(v: np.ndarray) -> tuple[float, np.ndarray]:
        score = signed @ v
        slope = 0.5 * (1 - np.tanh(score / 2))  # 1 / (1 + exp(score)), without overflow
        return float(np.logaddexp(0.0, -score).sum()), -(slope @ signed)

    found = minimize(
        loss, np.zeros(signed.shape[1]), jac=True, method="L-BFGS-B",
        options={"maxiter": 1000, "maxfun": 1500, "maxcor": 20, "gtol": 1e-4, "ftol": 0.0},
    )  # fmt: skip
    weight = found.x[:-1]
    if not np.isfinite(weight).all() or not math.isfinite(found.fun):
        raise Untestable("the head could not be fitted")
    return center, weight / scale

"""Stand-ins fitted to the layers of a model: which layers, on what sample, and the guides that use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mohs import streams
from mohs.errors import MohsError
from mohs.evaluation import _layers
from mohs.gradients import Past, Through
from mohs.gradients.fitted import Fitted, fit, kinds
from mohs.target import classify
from mohs.threat import Threat

WORDS = {
    "pointwise": "1x1 convolution",
    "local": "pair of 3x3 convolutions",
    "linear": "linear map",
    "hidden": "hidden layer",
}
COPIES = 4
"""How often each input of the sample is shown: as it is, and with noise, half of it of the size of the radius."""
CLOSE = 0.05
"""Share of the outputs' variance that a stand-in may leave unexplained; one that leaves less has nothing to add to it."""
PLACES = 1
"""Layers before which everything is fitted at once."""
Make = Callable[[nn.Module], nn.Module]


def fitted(model: nn.Module, x: Tensor, threat: Threat) -> Iterator[tuple[str, Make]]:
    """(name, what makes the guide) of every fitted stand-in, simple ones first; each is fitted when it is asked for.

    Args:
        model: under suspicion.
        x: inputs it is meant for [N, ...].
        threat: whose radius and box the sample keeps to.

    Cost: 4 forwards of the model for each input and place, and the fits.
    """
    x = _sample(x, threat)
    lost = _layers.losing(model, x, any_shape=True)
    names = list(dict.fromkeys([*lost, *_layers.bare(model, x, any_shape=True)]))
    sets = [lost, names] if lost and set(names) - set(lost) else [names]
    covered: list[Tensor] = []
    for layers in sets if names else ():
        pairs = _heard(model, x, layers)
        layers = [name for name in layers if name in pairs and kinds(*pairs[name])]
        if all(_identical(*pairs[name]) for name in layers):
            continue
        covered += [pairs[name][1] for name in layers]
        for place in range(max((len(kinds(*pairs[name])) for name in layers), default=0)):
            stand_ins, word = _stand_ins(pairs, layers, place)
            if stand_ins:
                listed = ", ".join(layers)
                yield f"through {listed} by a fitted {word}", partial(Through, layers=stand_ins)
                if max(stand_in.error for stand_in in stand_ins.values()) < CLOSE:
                    break
    for name in _layers.entrances(model, x, any_shape=True)[:PLACES]:
        heard = _heard(model, x, [name]).get(name)
        if heard is None or any(heard[0].shape == went.shape and torch.equal(heard[0], went) for went in covered):
            continue  # what lies before it has been fitted already
        pair = x[: len(heard[0])], heard[0]
        for kind in () if _identical(*pair) else kinds(*pair):
            backward = _or_none(pair, kind)
            if backward is not None:
                yield (
                    f"past what comes before {name} by a fitted {WORDS[kind]}",
                    partial(Past, layer=name, backward=backward),
                )


def _identical(came: Tensor, went: Tensor) -> bool:
    """Does the identity resemble the layer so well that nothing is left to fit?"""
    return came.shape == went.shape and float((went - came).square().mean()) < CLOSE * float(went.var(correction=0))


def _stand_ins(
    pairs: dict[str, tuple[Tensor, Tensor]], layers: Sequence[str], place: int
) -> tuple[dict[str, Any], str]:
    """One for each layer: its kind at this place of the list, or its last; and the word for them."""
    found, words = {}, []
    for name in layers:
        able = kinds(*pairs[name])
        kind = able[min(place, len(able) - 1)]
        found[name] = _or_none(pairs[name], kind)
        words.append(WORDS[kind])
    if any(f is None for f in found.values()):
        return {}, ""
    return found, " or ".join(dict.fromkeys(words))


def _or_none(pair: tuple[Tensor, Tensor], kind: str) -> Fitted | None:
    try:
        return fit(*pair, kind)
    except MohsError:
        return None


def _sample(x: Tensor, threat: Threat) -> Tensor:
    """Inputs, random points of their regions, and points with more noise, in the box."""
    keys = streams.derive(streams.content_keys(x), streams.text_key("fitted"))
    shape, (lo, hi) = tuple(x.shape[1:]), threat.box
    wide = 0.25 * (float(x.max() - x.min()) or 1.0)
    parts = [x]
    for copy in range(1, COPIES):
        key = streams.derive(keys, copy)
        if copy % 2:
            parts.append(threat.region.start(x, x.new_full((len(x),), threat.region.eps), threat.box, key))
        else:
            parts.append((x + wide * streams.normal(key, shape, dtype=x.dtype)).clamp(lo, hi))
    return torch.cat(parts)


def _heard(model: nn.Module, x: Tensor, names: Sequence[str], batch: int = 64) -> dict[str, tuple[Tensor, Tensor]]:
    """What each layer gets and gives for inputs x, at its first call; without those that do not take it row by row."""
    known = dict(model.named_modules())
    heard: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names if name in known}

    def note(name: str, part: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            came = inputs[0] if inputs else None
            if not isinstance(came, Tensor) or not isinstance(output, Tensor):
                return
            if len(came) == len(output) == batch and len(heard[name]) == part:
                heard[name].append((came.detach().clone(), output.detach().clone()))

        return hook

    parts = [p for p in x.split(batch) if len(p) == batch] or [x]
    batch = len(parts[0])
    for at, part in enumerate(parts):
        handles = [known[name].register_forward_hook(note(name, at)) for name in heard]
        try:
            with torch.no_grad():
                classify(model, part)
        finally:
            for handle in handles:
                handle.remove()
    whole = {name: pairs for name, pairs in heard.items() if len(pairs) == len(parts)}
    return {name: (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])) for name, pairs in whole.items()}

"""Which layer it is: names for what the checks have seen, from a pass or two of a few rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from mohs import streams
from mohs.errors import FAILURES
from mohs.evaluation import _layers
from mohs.evaluation.checks._probe import Probe
from mohs.target import classify

ROWS = 4
"""Inputs that are looked at, unless said otherwise."""
MOST = 4
"""Layers without weights that are passed over at most, one by one."""
OWN = "in the model's own forward, outside its layers"

Naming = Callable[..., str]


def _or_nothing(function: Naming) -> Naming:
    """A model that cannot be looked into gets no name, and no error."""

    @wraps(function)
    def guarded(*args: Any) -> str:
        try:
            return function(*args)
        except FAILURES:
            return ""

    return guarded


def named(model: nn.Module, layers: list[str]) -> str:
    """Layers with their kinds, as messages write them.

    >>> named(nn.Sequential(nn.Flatten(), nn.ReLU()), ["0", "1"])
    'layers 0 (Flatten), 1 (ReLU)'
    """
    kinds = dict(model.named_modules())
    words = [f"{name} ({type(kinds[name]).__name__})" if name in kinds else name for name in layers]
    return f"{'layer' if len(words) == 1 else 'layers'} {', '.join(words)}"


@_or_nothing
def zeroed(probe: Probe, rows: Tensor) -> str:
    """Where the gradients of these rows of the sample become zero. Up to 9 passes of 4 rows."""
    x = probe.x[rows[:ROWS]]
    lost = _layers.losing(probe.model, x, True)
    if lost:
        return "in " + named(probe.model, lost) + (", the last first" if len(lost) > 1 else "")
    calls = _layers.trace(probe.model, x)
    whole = bool(calls) and _alive(calls[0].slopes[0])  # the first layer hands a gradient on, and the input gets none
    return OWN if whole else ""


@_or_nothing
def breaking(probe: Probe, rows: int, kept: Callable[[nn.Module | None, int], bool]) -> str:
    """The layer without which the gradient keeps its promise: up to 4 layers that have no weights are passed over one by one,
    then all of them. Up to 10 passes of ``rows`` rows.

    Args:
        probe: model and sample.
        rows: of the sample, that are looked at.
        kept: does the gradient of a guide keep its promise on so many rows? None: of the model itself.
    """
    bare = _layers.bare(probe.model, probe.x)[:MOST]
    if not bare or kept(None, rows):
        return ""
    for names in [[name] for name in bare] + ([bare] if len(bare) > 1 else []):
        if kept(_layers.Through(probe.model, dict.fromkeys(names)), rows):
            return "in " + named(probe.model, names)
    return ""


@_or_nothing
def differing(model: nn.Module, x: Tensor) -> str:
    """The first layer that answers otherwise when it is given the same again. 2 passes of ``x``."""
    first, second = _calls(model, x), _calls(model, x)
    found = [
        key for key, (came, went) in first.items()
        if key in second and second[key][0] == came and second[key][1] != went
    ]  # fmt: skip
    # a model, and a block of layers, differ because of a layer inside
    inner = [key for key in found if not any(_inside(other[0], key[0]) for other in found)]
    if not inner:
        return ""
    name = inner[0][0]
    if not name:
        return OWN
    module = model.get_submodule(name)
    own = "the forward of " if next(module.children(), None) is not None else ""
    return f"in {own}{named(model, [name])}"


def _inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(f"{outer}."))


def _calls(model: nn.Module, x: Tensor) -> dict[tuple[str, int], tuple[list[int], list[int]]]:
    """By layer and number of its call, in the order of their ends: what it got and what it gave, as keys of the contents."""
    seen: dict[tuple[str, int], tuple[list[int], list[int]]] = {}
    came: dict[str, list[list[int]]] = {}
    counts: dict[str, int] = {}

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            came.setdefault(name, []).append(_keys((args, kwargs)))

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            counts[name] = counts.get(name, -1) + 1
            seen[name, counts[name]] = came[name].pop(), _keys(output)

        return hook

    # scripted layers take no hooks
    layers = [(n, m) for n, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule)]
    handles = [m.register_forward_pre_hook(enter(n), with_kwargs=True) for n, m in layers]
    handles += [m.register_forward_hook(leave(n), with_kwargs=True) for n, m in layers]
    try:
        with torch.no_grad():
            classify(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _keys(value: Any) -> list[int]:
    """Of the contents of all tensors in a value, row by row."""
    if isinstance(value, Tensor):
        value = value.detach()
        value = value.float() if value.dtype == torch.bfloat16 else value  # which numpy does not know
        return streams.content_keys(value.reshape(len(value) if value.dim() else 1, -1)).tolist()
    if isinstance(value, dict):
        value = list(value.values())
    return [key for part in value for key in _keys(part)] if isinstance(value, list | tuple) else []


def _alive(slope: Tensor | None) -> bool:
    return slope is not None and bool((slope != 0).any())

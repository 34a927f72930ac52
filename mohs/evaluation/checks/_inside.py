"""Check of what a forward pass does: does the model search for its answer?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mohs.errors import FAILURES
from mohs.evaluation._quiet import untouched
from mohs.evaluation.checks._probe import Probe
from mohs.evaluation.checks._seen import Seen, ok, untested

SEARCHES = frozenset({torch.autograd.grad, torch.autograd.backward, Tensor.backward})
"""What a model calls that descends along a gradient while it answers."""


def inner_search(probe: Probe) -> Seen:
    """Does the model optimise while it answers, or go through one of its layers again and again? 1 pass of 1 row."""
    calls: Counter[str] = Counter()
    # a layer without weights, such as one ReLU, is often used in several places
    # scripted layers take no hooks
    layers = [
        (n, m)
        for n, m in probe.model.named_modules()
        if n and next(m.parameters(recurse=False), None) is not None and not isinstance(m, torch.jit.ScriptModule)
    ]

    def counts(name: str) -> Callable[..., None]:
        return lambda *_: calls.update([name])

    handles = [m.register_forward_hook(counts(n)) for n, m in layers]
    watch = _Watch()
    try:
        with untouched(probe.model), watch:
            probe.forward(probe.x[:1])
    except FAILURES:
        return untested("the model does not take a single input, or lets nobody watch")
    finally:
        for handle in handles:
            handle.remove()
    loops = f"layer {calls.most_common(1)[0][0]} is passed {max(calls.values())} times" if calls else ""
    looped = bool(calls) and max(calls.values()) > 1
    if watch.searches:
        return Seen(
            "warn",
            f"one forward pass takes gradients {watch.searches} times{', and ' + loops if looped else ''}: the model searches for its "
            "answer",
            "The gradient of such a search is cut off, or vanishes or explodes on its way back through all of its steps. Attacks "
            "that follow it say little of the model, and each of their passes costs as many as the search takes.",
            "Attack what the search begins and ends with: mohs.gradients.Through with the identity as stand-in, or the model "
            "without it as a guide; with a generator, search its latents: mohs.attacks.Latent. Where no gradient is left, evaluations "
            "try the first by themselves.",
        )  # fmt: skip
    if looped:
        return Seen(
            "info", f"in one forward pass, {loops}",
            "The model repeats a part of itself (an ensemble of views, a recurrence, an iteration); gradients pass through every turn.",
        )  # fmt: skip
    return ok("no gradient is taken in a forward pass, and no layer with weights is passed twice")


class _Watch(TorchFunctionMode):
    """Counts searches along gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.searches = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.searches += func in SEARCHES
        return func(*args, **(kwargs or {}))

"""Which layers lose the gradient, and which only look as if they could stand aside: one traced pass at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mohs.errors import ModelError
from mohs.evaluation.checks._probe import frozen
from mohs.gradients import Through
from mohs.gradients.bpda import StandIn, identity
from mohs.objectives import margin
from mohs.problem import Goal
from mohs.target import classify

ROWS = 4
"""Inputs a trace looks at."""
MOST = 8
"""Layers a bisection mends at most."""


@dataclass
class Call:
    """One call of a layer in a forward pass, in order of the calls' ends."""

    name: str
    module: nn.Module
    came: Tensor
    went: Tensor
    began: int
    slopes: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def fits(self) -> bool:
        """Could the identity stand in for it?"""
        return compatible(self.came, self.went)

    @property
    def bare(self) -> bool:
        """A layer of the model's own kind without weights: a candidate for rounding, thresholds, pruning, noise."""
        own = not type(self.module).__module__.startswith("torch.nn.")
        return own and next(self.module.parameters(), None) is None


def trace(model: nn.Module, x: Tensor, back: bool = True) -> list[Call]:
    """Every call of a layer with a tensor in and a tensor out, as ``model`` answers to ``x``; ``back``: with gradients of the
    margin of its own answer in ``slopes``, where they arrive."""
    calls: list[Call] = []
    began: dict[int, int] = {}
    # scripted layers take no hooks
    names = {m: n for n, m in model.named_modules() if n and not isinstance(m, torch.jit.ScriptModule)}
    order = iter(range(1 << 30))

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        began[id(module)] = next(order)

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        came = inputs[0] if inputs else None
        if isinstance(came, Tensor) and isinstance(output, Tensor) and came.is_floating_point():
            calls.append(Call(names[module], module, came, output, began[id(module)]))

    handles = [m.register_forward_pre_hook(enter) for m in names]
    handles += [m.register_forward_hook(leave) for m in names]
    try:
        with torch.enable_grad(), frozen(model):
            logits = classify(model, x.detach().clone().requires_grad_(True))
            if back and logits.requires_grad:
                _, cotangent = margin(logits.detach(), Goal.leave(logits.argmax(1)))
                _pull(logits, cotangent, calls)
    finally:
        for handle in handles:
            handle.remove()
    return sorted(calls, key=lambda call: call.began)


def _pull(logits: Tensor, cotangent: Tensor, calls: list[Call]) -> None:
    """Note the gradients at all calls; not with backward(), which would leave some in leaves that are no parameters."""
    tensors = [t for c in calls for t in (c.came, c.went) if t.requires_grad]
    try:
        found = iter(torch.autograd.grad(logits, tensors, cotangent, allow_unused=True) if tensors else ())
    except RuntimeError:  # a backward pass that raises names no layer
        return
    for call in calls:
        came, went = (next(found) if t.requires_grad else None for t in (call.came, call.went))
        call.slopes = came, went


def losing(model: nn.Module, x: Tensor, any_shape: bool = False) -> list[str]:
    """The layers that lose the gradient, the last first: each is passed over and the next one looked for, until a gradient
    arrives at the input or no layer can be named. ``any_shape``: also such as the identity has no shape for."""
    lost: list[str] = []
    shapes: dict[str, StandIn | None] = {}
    for _ in range(MOST):
        guide = Through(model, shapes) if lost else model
        calls = [c for c in trace(guide, x[:ROWS]) if (c.fits or any_shape) and c.module is not model]
        found = [c for c in calls if _alive(c.slopes[1]) and not _alive(c.slopes[0]) and _name(c, lost) not in lost]
        if not found:
            # cut off: what comes out is needed, and cannot be differentiated at all
            found = [
                c for c in calls if c.came.requires_grad and not c.went.requires_grad and _name(c, lost) not in lost
            ][-1:]
        if not found:
            return lost
        inner = min(found, key=lambda c: sum(1 for _ in c.module.modules()))
        lost.append(_name(inner, lost))
        shapes[lost[-1]] = None if inner.fits else _spread(inner.went)
    return lost


def _spread(like: Tensor) -> StandIn:
    """The mean of each row's inputs, in the shape of ``like``: some gradient, whatever its direction."""
    shape = like.shape[1:]
    return lambda x: x.flatten(1).mean(1).view(-1, *[1] * len(shape)).expand(-1, *shape)


def _name(call: Call, lost: list[str]) -> str:
    return call.name.removeprefix("model.") if lost else call.name


def _alive(slope: Tensor | None) -> bool:
    return slope is not None and bool((slope != 0).any())


def bare(model: nn.Module, x: Tensor, any_shape: bool = False) -> list[str]:
    """Layers of the model's own kinds that have no weights and keep their input's shape."""
    seen = [c for c in trace(model, x[:ROWS], back=False) if c.bare and (c.fits or any_shape)]
    return list(dict.fromkeys(c.name for c in seen if not list(c.module.children())))


def entrances(model: nn.Module, x: Tensor, any_shape: bool = False) -> list[str]:
    """Layers that get something of the shape of an input that is not the input itself, before any weight was used."""
    found: list[str] = []
    handed: list[Tensor] = []
    calls = trace(model, x[:ROWS], back=False)
    weighted = [c.began for c in calls if next(c.module.parameters(recurse=False), None) is not None]
    for call in calls:
        if weighted and call.began > weighted[0]:
            break
        came = call.came
        if any(came is other for other in handed):
            continue  # a container hands its input on to its first layer
        itself = came.shape == x[:ROWS].shape and torch.equal(came.detach(), x[:ROWS])
        alike = came.dim() == x.dim() and len(came) % ROWS == 0 and compatible(x[:ROWS], came)
        if not itself and (alike or (any_shape and len(came) == len(x[:ROWS]))):
            found.append(call.name)
        handed.append(came)
    return found


def compatible(x: Tensor, like: Tensor) -> bool:
    """Can ``identity`` bring the one into the shape of the other?"""
    try:
        identity(x, like)
    except ModelError:
        return False
    return True

"""Straight through functions instead of layers: for models whose code is unknown, as long as it calls torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from mohs.errors import ModelError
from mohs.gradients._comparisons import Comparisons
from mohs.gradients._reached import Reached
from mohs.guide import Guide, instead, paused

STAIRS = frozenset(
    {"round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "detach", "fake_quantize_per_tensor_affine"}
)
"""Functions of torch that keep the shape of their first argument and have no useful gradient."""
OUTSIDE = frozenset({"numpy", "__array__", "__dlpack__", "tolist", "item", "__float__", "__int__", "__bool__"})
"""Ways out of torch, which want a tensor without a graph."""
ATTRIBUTES = frozenset({"__get__", "__set__", "__delete__"})
"""Reading and writing what belongs to a tensor, such as its gradient."""
_GRAD: Any = Tensor.grad  # of the class: the attribute itself
SLOPES = frozenset({torch.autograd.grad, _GRAD.__get__})
"""How a model gets the gradients that its own search follows."""
STRAIGHT = "_InsteadBackward"
"""What torch calls the node of ``instead``."""
SOFT = frozenset({"softmax", "log_softmax", "sigmoid"})


class _Mended(TorchFunctionMode):
    """While active, stairs are passed straight through, and gradients are recorded even where the model forbids it.

    A search that the model makes by gradients of its own, from a point that it makes for that, is left alone: only what it found
    goes on.
    """

    def __init__(self, x: Tensor, attach: bool, compare: bool) -> None:
        super().__init__()
        self.x, self.attach = x, attach
        self.comparisons = Comparisons() if compare else None
        self.input, self.searches = Reached(x), Reached()
        self.slopes: dict[int, Tensor] = {}  # kept, so that no id is given anew

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if paused():
            return func(*args, **kwargs)
        if (
            name == "_set_grad_enabled"
        ):  # the model's own mode, which is looked at below; what is computed has a graph in either
            return func(*args, **kwargs)
        forbidden = not torch.is_grad_enabled()
        if forbidden and _in_place(name) and any(_leaf(value) for value in _flat(args[:1])):  # an optimiser's step
            return func(*args, **kwargs)
        if not forbidden and self.searches.ends and any(self.searches.by(value) for value in _flat(args)):
            return self._noted(func, func(*args, **kwargs))
        if any(id(value) in self.slopes for value in args) and not any(self.input.by(value) for value in args):
            return self._noted(torch.autograd.grad, func(*args, **kwargs))
        if not forbidden and name == "requires_grad_" and _meant_as_leaf(args[0]):
            value = args[0].detach().requires_grad_()
        else:
            with torch.enable_grad():
                value = func(*args, **kwargs) if name in ATTRIBUTES else self._computed(name, func, args, kwargs)
        if _begins(value) and value is not self.x:
            self.searches.ends.append(value)
        # what a search has found is no part of it any more
        found = forbidden and not _in_place(name) and self.searches.by(value) and not self.input.by(value)
        return value.detach() if found else value

    def _noted(self, func: Callable[..., Any], value: Any) -> Any:
        """What a search follows, and is made of that, is no part of the way from the input to the answer."""
        if func in SLOPES:
            self.slopes |= {id(slope): slope for slope in _flat((value,)) if isinstance(slope, Tensor)}
        return value

    def _computed(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of ``func``, with a graph that leads past stairs."""
        if self.attach:
            # what is to be changed in place must stay itself
            args = tuple(value if _in_place(name) and not i else self._attached(value) for i, value in enumerate(args))
        first = args[0] if args else None
        if name in OUTSIDE and isinstance(first, Tensor) and first.requires_grad:
            return func(first.detach(), *args[1:], **kwargs)
        if name in STAIRS and isinstance(first, Tensor) and first.requires_grad:
            with torch.no_grad():
                value = func(*args, **kwargs)
            return instead(value, first) if isinstance(value, Tensor) and value.shape == first.shape else value
        if self.comparisons is not None:
            return self.comparisons.call(name, func, args, kwargs)
        return func(*args, **kwargs)

    def _attached(self, value: Any) -> Any:
        alike = (
            isinstance(value, Tensor) and value is not self.x and not isinstance(value, nn.Parameter)
            and value.is_floating_point() and value.shape == self.x.shape and value.dtype == self.x.dtype
        )  # fmt: skip
        # a gradient may get to weights, or to where a search of the model began, and not to the input
        return instead(value, self.x) if alike and not self.input.by(value) else value


def _in_place(name: str) -> bool:
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _leaf(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and value.is_leaf


def _begins(value: Any) -> bool:
    """Is it a point that the model wants gradients of?"""
    return _leaf(value) and not isinstance(value, nn.Parameter)


def _meant_as_leaf(value: Any) -> bool:
    """Is it a tensor that the model detached, and that has a graph only because that was passed straight through?"""
    node = value.grad_fn if isinstance(value, Tensor) else None
    passed = False
    while node is not None and node.name() in ("CloneBackward0", STRAIGHT):
        passed |= node.name() == STRAIGHT
        node = next((parent for parent, _ in node.next_functions if parent is not None), None)
    return passed


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield from value if isinstance(value, list | tuple) else (value,)


class Straight(Guide):
    """A model whose roundings, signs and detachments have the backward pass of the identity, wherever its code calls them.

    For functions that are no layers of their own, and for modules that show none: each call of ``torch.round``, ``floor``,
    ``sign``, ``Tensor.detach`` and the like is passed straight through, and ``torch.no_grad`` has no effect.

    Args:
        model: the classifier.
        attach: also let the gradient go on to the input from every tensor of the input's shape that is cut off from it, as
            what comes back from numpy or an image library is.
        custom: also replace the backward pass of every custom ``torch.autograd.Function`` whose output has the shape of one of
            its inputs. Some of these are honest.
        compare: also give comparisons (``x > 0.5``) the slope of a soft step, a fifth of the standard deviation of what is
            compared wide, wherever their truth values become numbers or choose between numbers: masks, thresholds, codes.

    It cannot see into compiled code, nor that a parameter which the model makes during its answer is one (a search over an
    ``nn.Parameter`` of its own may end elsewhere with ``attach``).

    >>> class Coarse(nn.Module):
    ...     def forward(self, x):
    ...         return (x * 3).round() @ torch.eye(2)
    >>> x = torch.rand(1, 2, requires_grad=True)
    >>> (g,) = torch.autograd.grad(Straight(Coarse().eval())(x)[:, 0].sum(), x)
    >>> g.tolist()
    [[3.0, 0.0]]

    **Differs from the paper**: it finds the calls by itself.
    **Source**: A. Athalye, N. Carlini, D. Wagner, "Obfuscated gradients give a false sense of security", ICML 2018,
    section 4.1; Y. Bengio, N. Leonard, A. Courville, "Estimating or propagating gradients through stochastic neurons", 2013.
    """

    def __init__(self, model: nn.Module, attach: bool = False, custom: bool = False, compare: bool = False) -> None:
        super().__init__(model)
        self.attach, self.custom, self.compare = attach, custom, compare

    def forward(self, x: Tensor) -> Tensor:
        """The model's logits, bit for bit."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.model(x)
        with _Mended(x, self.attach, self.compare):
            logits = self.model(x)
        if self.custom:
            for node in _custom_nodes(logits):
                node.register_hook(_pass_on)
        return logits

    def extra_repr(self) -> str:
        """What a record names."""
        return f"attach={self.attach}, custom={self.custom}, compare={self.compare}"


def _custom_nodes(logits: Tensor) -> Iterator[torch.autograd.graph.Node]:
    """The custom functions in the graph of ``logits``."""
    seen, waiting = set(), [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [parent for parent, _ in node.next_functions]
        if isinstance(node, BackwardCFunction):
            yield node


def _pass_on(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
    """What comes from behind goes on to the first input of its shape."""
    arrived = next((g for g in outputs if g is not None), None)
    for place, gradient in enumerate(inputs):
        if arrived is not None and gradient is not None and gradient.shape == arrived.shape:
            return (*inputs[:place], arrived, *inputs[place + 1 :])
    return None


class _Listening(TorchFunctionMode):
    """Keeps what goes into each softmax (or the like) over single answers."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.heard: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        value = args[0] if args else None
        if isinstance(value, Tensor) and value.dim() == 2 and len(value) == self.rows and not paused():
            self.heard += [value] if getattr(func, "__name__", "") in SOFT else []
        return func(*args, **(kwargs or {}))


class BeforeSoftmax(nn.Module):
    """What goes into a model's first softmax over its classes: the logits it does not show.

    Probabilities that have rounded to 0 and 1 have no gradient; the values before them do. The answers are others than the
    model's, though mostly in the same order, so what is found with this guide is confirmed on the model.

    Args:
        model: a classifier that calls ``softmax``, ``log_softmax`` or ``sigmoid`` on [B, K].

    Raises:
        ModelError: at the first call, where it does not.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Softmax(1)).eval()
    >>> x = torch.rand(4, 2)
    >>> torch.equal(BeforeSoftmax(net)(x), net[0](x))
    True
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K]."""
        with _Listening(len(x)) as mode:
            answers = self.model(x)
        # others, such as the gate of an inner layer, have another number of columns
        fitting = [value for value in mode.heard if value.shape == answers.shape]
        if not fitting:
            raise ModelError(
                "The model calls no softmax over [B, K], so there is nothing before it. Use it as it is, or another guide."
            )
        return fitting[0]

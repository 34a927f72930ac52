"""What a step may disturb and must put back: the global generators, and the train/eval mode of each module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mohs import streams


def _generators() -> list[torch.Generator]:
    cuda = list(torch.cuda.default_generators) if torch.cuda.is_initialized() else []
    return [torch.default_generator, *cuda]


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Inside, torch's global generators are seeded by ``parts`` (dropout knows no others); afterwards as they were."""
    saved = [(g, g.get_state()) for g in _generators()]
    for generator, _ in saved:
        generator.manual_seed(number(*parts))
    try:
        yield
    finally:
        for generator, state in saved:
            generator.set_state(state)


def number(*parts: object) -> int:
    """A seed in [0, 2**63) from any printable parts.

    >>> number(0, "order", 1) == number(0, "order", 1) != number(0, "order", 2)
    True
    """
    return streams.text_key(" ".join(map(str, parts))) & ((1 << 63) - 1)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Puts every module back into the mode it was in; ``model.train(was)`` would flip frozen parts with the rest."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in eval mode inside: an attack must not face batch statistics or dropout, nor change the former."""
    with modes_kept(model):
        model.eval()
        yield


@contextmanager
def mixed(model: nn.Module, precision: str) -> Iterator[None]:
    """Passes through the model in bfloat16 where asked, inside; its answers stay in single precision, as losses need them."""
    if precision == "float32":
        yield
        return
    plain, device = model.forward, next(model.parameters()).device.type
    own = model.__dict__.get("forward")  # where somebody, or torch.compile, put one there

    def forward(*inputs: Any, **named: Any) -> Any:
        with torch.autocast(device, getattr(torch, precision)):
            answer = plain(*inputs, **named)
        return answer.float() if isinstance(answer, Tensor) and answer.dtype.itemsize < 4 else answer

    model.__dict__["forward"] = forward  # backward passes run outside of autocast, as it asks for
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if own is not None:
            model.__dict__["forward"] = own

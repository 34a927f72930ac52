"""Nets that a training uses and does not change: teachers, sources of adversarial points, weights to start from."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from mohs.defenses.training._quiet import evaluating
from mohs.errors import ModelError, UsageError
from mohs.models import code_hash, load, weights_hash
from mohs.target import classify

BUNDLED, WEIGHTS = "bundled:", ".safetensors"
FORMS = "'bundled:NAME', 'FILE.safetensors' as mohs train writes it, or a module"


class Pretrained:
    """A fixed net, in eval mode, known by what it computes: its repr, and so a recipe's identity, holds a hash of its
    weights and of its code. A training that is resumed with another one is refused.

    Args:
        net: ``bundled:NAME``; a ``.safetensors`` file that names its net, as ``mohs train`` writes it (relative paths start
            at the working directory); or a module, which is copied. Other forms are not loaded from here, so that a recipe in
            TOML stays data: give ``mohs.models.load(...)``.

    Raises:
        UsageError: It is none of these.
        ModelError: The file or the bundled net cannot be loaded, or the module cannot be copied.

    >>> net = nn.Linear(2, 2)
    >>> fixed = Pretrained(net)
    >>> _ = net.weight.data.zero_()
    >>> fixed == Pretrained(net), Pretrained(fixed.module) == fixed  # a copy, known by its weights
    (False, True)
    """

    def __init__(self, net: nn.Module | str | Path) -> None:
        if isinstance(net, nn.Module):
            self.name = type(net).__name__
            try:
                self.module = copy.deepcopy(net)
            except Exception as error:
                raise ModelError(
                    f"{self.name} cannot be copied ({type(error).__name__}: {error}), so nothing would keep it from being "
                    "changed. Give a module of parameters and buffers alone."
                ) from error
        elif isinstance(net, str | Path) and (str(net).startswith(BUNDLED) or str(net).lower().endswith(WEIGHTS)):
            self.name = str(net)
            self.module = load(self.name)
        else:
            raise UsageError(
                f"{net!r} cannot be loaded as a fixed net. Allowed: {FORMS}. In Python, mohs.models.load makes one of "
                "other forms."
            )
        self.module.eval().requires_grad_(False)
        parts = f"{weights_hash(self.module)} {code_hash(self.module)}"
        self.hash = hashlib.sha256(parts.encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"Pretrained({self.name!r}, hash={self.hash!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pretrained) and self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    def on(self, device: torch.device) -> nn.Module:
        """The module on a device."""
        return self.module.to(device)

    def answers(self, x: Tensor) -> Tensor:
        """Its logits [B, K], without a graph.

        Raises:
            ModelError: It does not take these inputs.
        """
        try:
            with torch.no_grad():
                return classify(self.on(x.device), x)
        except ModelError as error:
            raise ModelError(f"{self!r}: {error}") from error

    def check(self, model: nn.Module, x: Tensor) -> None:
        """Does it know as many classes as ``model``? Asked at the inputs ``x`` [B, ...].

        Raises:
            UsageError: It does not.
            ModelError: One of the two does not take these inputs.
        """
        with evaluating(model), torch.no_grad():
            own = classify(model, x).shape[1]
        its = self.answers(x).shape[1]
        if its != own:
            raise UsageError(
                f"{self!r} knows {its} classes, the net in training {own}. Give a net that was trained on the same classes."
            )


def pretrained(net: Pretrained | nn.Module | str | Path, role: str = "fixed net") -> Pretrained:
    """The same, if it is one already; else made from a reference or a module. Errors begin with its ``role``.

    Raises:
        UsageError, ModelError: See ``Pretrained``.
    """
    if isinstance(net, Pretrained):
        return net
    try:
        return Pretrained(net)
    except UsageError as error:
        raise type(error)(f"{role}: {error}") from error

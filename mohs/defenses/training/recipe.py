"""A recipe: everything that determines a training run, as one value."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mohs.defenses._settings import number
from mohs.defenses.training.objective import Objective, against, layers
from mohs.defenses.training.pretrained import Pretrained, pretrained
from mohs.defenses.training.schedules import Adam, Constant, Optimiser, Schedule
from mohs.errors import UsageError
from mohs.models import NETS
from mohs.models.weights import fit
from mohs.threat import Threat

PRECISIONS = ("float32", "bfloat16")
"""Of the passes through the net while it is trained."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a training run; its repr is its record and its hash guards a resumption.

    Args:
        name: what the result is called.
        data: where the training data are, as ``mohs.data.load`` takes it (split 'train').
        net: a name in ``mohs.models.NETS``.
        objective: what is minimised: ``Saddle(attack)``, ``TRADES()``, another of ``mohs.defenses.training``, or
            your own.
        epochs: passes over the data.
        threat: region and box of the objective's attack and of the early warning; a ``Threat`` or its short form.
        batch: examples per step, over all devices together.
        optimiser: ``SGD(...)`` or ``Adam(...)``.
        schedule: ``Constant()``, ``Steps(...)`` or ``Cosine(...)``.
        warmup: epochs over which the radius grows linearly from near zero to the threat's.
        holdout: examples at the end of the training data that are not trained on but watched, for the early warning.
        seed: of weights, data order and attacks.
        net_options: arguments of the net's factory.
        averaging: decay in (0, 1) of the exponential average of the weights from step to step, such as 0.999; then the
            average is what is measured and saved. None: the weights themselves.
        precision: 'float32', or 'bfloat16': passes through the net in mixed precision (``torch.autocast``), those of the attack
            included; weights, gradients and updates stay as they are. Faster where the processor knows bfloat16; a little accuracy may
            go with it.
        start: the trained net to go on from, of the architecture ``net``: ``bundled:NAME``, a ``.safetensors`` file that names
            its net, or a module; its hash is part of the recipe. None: random weights.

    >>> from mohs.defenses.training import Natural
    >>> Recipe("tiny", "bundled:fashion-mnist", "linear", Natural(), epochs=2).epochs
    2
    """

    name: str
    data: str
    net: str
    objective: Objective
    epochs: int
    threat: Threat | str | None = None
    batch: int = 128
    optimiser: Optimiser = field(default_factory=Adam)
    schedule: Schedule = field(default_factory=Constant)
    warmup: float = 0.0
    holdout: int = 500
    seed: int = 0
    net_options: Mapping[str, Any] = field(default_factory=dict)
    averaging: float | None = None
    precision: str = "float32"
    start: Pretrained | nn.Module | str | None = None

    def __post_init__(self) -> None:
        for what, value, least in (("epochs", self.epochs, 1), ("batch", self.batch, 1), ("holdout", self.holdout, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{what} of recipe {self.name!r} must be a whole number >= {least}; got {value!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise UsageError(f"seed of recipe {self.name!r} must be a whole number; got {self.seed!r}.")
        if not 0 <= self.warmup <= self.epochs:
            raise UsageError(
                f"warmup of recipe {self.name!r} must lie between 0 and its {self.epochs} epochs; got {self.warmup!r}."
            )
        if self.averaging is not None:
            number(
                self.averaging,
                f"averaging of recipe {self.name!r}, the decay of an average,",
                0,
                1,
                above=True,
                below=True,
            )
        if self.precision not in PRECISIONS:
            raise UsageError(
                f"precision of recipe {self.name!r} was {self.precision!r}. Allowed: {', '.join(map(repr, PRECISIONS))}."
            )
        apart = [layer for layer in layers(self.objective) if not getattr(layer, "whole", True)]
        if apart and self.precision != "float32":
            raise UsageError(
                f"Recipe {self.name!r}: {type(apart[0]).__name__} calls parts of the net by themselves, which precision="
                f"{self.precision!r} would not reach. Leave precision out."
            )
        if not callable(getattr(self.objective, "loss", None)):
            raise UsageError(
                f"The objective of recipe {self.name!r} was {self.objective!r}. Allowed: a value with a method "
                "loss(model, x, y, context), such as Natural(), Mixture(attack) or Saddle(attack)."
            )
        object.__setattr__(self, "threat", None if self.threat is None else Threat.parse(self.threat))
        object.__setattr__(
            self, "start", None if self.start is None else pretrained(self.start, f"start of recipe {self.name!r}")
        )
        self._check_threat()

    def _check_threat(self) -> None:
        enemy, threat = against(self.objective), self.parsed_threat
        if threat is not None and threat.minimum and self.warmup > 0:
            raise UsageError(
                f"Recipe {self.name!r} has a warm-up of {self.warmup} epochs, but the threat {threat} has no radius that could "
                "grow. Leave warmup out."
            )
        if enemy is None:
            return
        if threat is None or (threat.minimum and not getattr(self.objective, "unbounded", False)):
            raise UsageError(
                f"Recipe {self.name!r} trains against {enemy} under the threat {self.threat}. "
                "Give a threat of finite radius, such as threat='linf:0.1'."
            )
        for layer in layers(self.objective):
            served = getattr(layer, "norms", None)
            if served is not None and threat.region.kind not in served:
                raise UsageError(
                    f"Recipe {self.name!r}: {type(layer).__name__} does not serve the threat {threat}. It serves: "
                    f"{', '.join(served)}. Choose one of these, or Saddle with an attack of that region."
                )

    @property
    def parsed_threat(self) -> Threat | None:
        """The threat, parsed."""
        return self.threat if isinstance(self.threat, Threat) else None

    @property
    def identity(self) -> str:
        """SHA-256 of everything the recipe states."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def build_net(self) -> nn.Module:
        """The net before its first step.

        Raises:
            UsageError: There is no such net, or it does not take these options.
            ModelError: The weights it is to start from are of another architecture.
        """
        if self.net not in NETS:
            raise UsageError(f"Recipe {self.name!r} asks for the net {self.net!r}. Allowed: {', '.join(NETS)}.")
        try:
            net = NETS[self.net](**self.net_options)
        except TypeError as error:
            raise UsageError(
                f"Recipe {self.name!r}: the net {self.net} does not take the options {self.net_options} ({error})."
            ) from error
        if self.start is not None:
            given = pretrained(self.start)
            fit(net, given.module.state_dict(), f"Recipe {self.name!r} starts the net {self.net} from {given!r}")
        return net

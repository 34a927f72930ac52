"""Check of the generators: does a model draw though it seems deterministic?"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mohs.errors import FAILURES
from mohs.evaluation._quiet import untouched
from mohs.evaluation.checks._probe import Probe
from mohs.evaluation.checks._seen import Seen, ok, untested

ROWS = 4
"""Inputs that are looked at."""
SEEDS = (104_723, 104_717)
"""From which the two passes start."""
SAMPLERS = (
    "rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "randperm", "normal", "uniform", "bernoulli",
    "multinomial", "exponential", "geometric", "cauchy", "log_normal", "poisson", "random", "native_dropout",
)  # fmt: skip
"""Operations that draw. Others may draw as well, but do so in training mode only, such as attention."""

States = dict[str, Any]


def frozen_seed(probe: Probe) -> Seen:
    """Does a model that repeats its answers draw all the same, from a seed of its own? 2 passes of 4 rows; none where the model is
    random. What numpy or Python draw from generators of the model's own is not seen."""
    if probe.random:
        return untested("the model is random and does not hide it")
    ends, moved, drawn = [], set(), set[str]()
    try:
        for seed in SEEDS:
            with untouched(probe.model, seed):
                before, watch = _states(), _Watch()
                with watch:
                    probe.forward(probe.x[:ROWS])
                ends.append(_states())
                moved |= {name for name, state in ends[-1].items() if state != before.get(name)}
                drawn |= watch.drawn
    except FAILURES:
        return untested("the model does not take so few inputs, or lets nobody watch")
    fixed = sorted(name for name in moved if ends[0].get(name) == ends[1].get(name))
    if fixed:
        return Seen(
            "warn",
            f"a forward pass leaves the global generator of {' and '.join(fixed)} in one and the same state, whatever it was "
            "before: the model seeds it",
            "What the model draws is the same each time, so an attacker can know it, and the results hold for this one seed. They "
            "say nothing of a model that draws anew, and fresh draws cannot be scored.",
            "Remove the seed from the forward pass, and state how the model is scored: Threat(..., draws=20).",
        )  # fmt: skip
    if moved:
        return Seen(
            "warn",
            f"a forward pass draws from the global generator of {' and '.join(sorted(moved))}, though equal inputs get equal answers",
            "Chance may decide on other inputs than these, such as attacked ones, and a single draw would then score them.",
            "Remove the unused draws; or state how the model is scored, if they matter: Threat(..., draws=20).",
        )  # fmt: skip
    if drawn:
        return Seen(
            "info",
            f"a forward pass draws ({', '.join(sorted(drawn))}) from a generator of the model's own, and always the same",
            "An attacker who has the model knows these draws: they are fixed numbers, and the results hold for them alone.",
            "If they are meant to be random, draw from the global generator, and state Threat(..., draws=20).",
        )  # fmt: skip
    return ok("no forward pass draws or sets a seed")


def _states() -> States:
    """Of every global generator, by the name of its library, in values that can be compared."""
    states: States = {"torch": torch.get_rng_state().numpy().tobytes(), "Python": random.getstate()}
    if (numpy := sys.modules.get("numpy")) is not None:
        _, words, at, *rest = numpy.random.get_state()
        states["numpy"] = (words.tobytes(), at, *rest)
    if torch.cuda.is_initialized():
        states["CUDA"] = tuple(s.numpy().tobytes() for s in torch.cuda.get_rng_state_all())
    return states


class _Watch(TorchDispatchMode):
    """Notes which operations draw, whatever their generator."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.removesuffix("_")
        if name in SAMPLERS:
            self.drawn.add(name)
        return func(*args, **(kwargs or {}))

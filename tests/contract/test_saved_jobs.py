"""A job that is saved at any pause and taken up by another process ends in the very bits of one that was not."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from cases import by_gradient, by_label, each_case, make, shape
from core_models import inputs, relu_net
from safetensors.torch import load, save
from torch import Tensor, nn

import mohs
from mohs import Threat
from mohs._rows import Rows
from mohs.attacks import PGD, Job, by_distance
from mohs.attacks import _wave as waves
from mohs.attacks._base import State

ROWS, BATCH = 13, 4


def job(name: str, threat: str, **settings: Any) -> Job:
    """Two restarts of thirteen rows in batches of four: two waves, holes, padding."""
    net, x = relu_net((6,)), inputs(ROWS, *shape(threat, 6))
    usual = {"restarts": 2, "batch": BATCH, "seed": 5}
    few = {"steps": 8} if by_label(name) else {}
    return Job(make(name, **few), net, x, net(x).argmax(1), Threat.parse(threat), **usual | settings)


def through_a_file(saved: tuple[dict[str, Tensor], str]) -> tuple[dict[str, Tensor], str]:
    """As another process reads it: memory that begins at any byte."""
    tensors = load(save(saved[0]))
    return {name: unaligned(value) for name, value in tensors.items()}, saved[1]


def unaligned(value: Tensor) -> Tensor:
    room = torch.zeros(value.numel() + 1, dtype=value.dtype)
    room[1:] = value.flatten()
    return room[1:].view(value.shape)


def assert_ends_alike(whole: Job, other: Job, open_then: Tensor) -> None:
    for name in waves.PROGRESS:
        left, right = getattr(whole, name), getattr(other, name)
        assert (left is None and right is None) or torch.equal(left.nan_to_num(7.0), right.nan_to_num(7.0)), name
    assert whole.spent == other.spent
    found, again = whole.outcome(open_then), other.outcome(open_then)
    for field in fields(found):
        a, b = getattr(found, field.name), getattr(again, field.name)
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) if isinstance(a, Tensor) else a == b, field.name


def check(begin: Any, every: int = 1) -> int:
    """Save at pauses of one run, go on from each; answers how many pauses there were."""
    whole = begin()
    saved = []
    for _ in whole.run():
        saved.append((waves.save(whole), (~whole.emitted).nonzero().squeeze(1)))
    assert bool(whole.emitted.all())
    for (tensors, text), open_then in saved[::every]:
        other = begin()
        waves.restore(other, *through_a_file((tensors, text)))
        for _ in other.run():
            pass
        assert_ends_alike(whole, other, open_then)
    return len(saved)


@each_case
def test_goes_on_from_any_pause(name: str, threat: str) -> None:
    assert check(lambda: job(name, threat), every=5 if by_gradient(name) else 20) >= 5


def test_from_every_single_pause() -> None:
    assert check(lambda: job("PGD", "linf:0.1")) >= 20
    assert check(lambda: job("DeepFool", "l2:inf")) >= 10  # deals rows anew at every step


def test_with_aims_half_ranked() -> None:
    assert check(lambda: job("APGD", "linf:0.05", aims=2, rank=by_distance)) >= 20


def test_with_warm_starts_and_a_trace() -> None:
    start = inputs(ROWS, 6).flip(0)
    check(lambda: job("PGD", "linf:0.1", start=start, trace=True))
    check(lambda: job("Square", "linf:0.1", start=start), every=7)


class Noisy(nn.Module):
    """Draws from the global generator in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = relu_net((6,))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.02 * torch.randn_like(x))


def test_with_a_random_model() -> None:
    net, x = Noisy().eval(), inputs(ROWS, 6)
    y = net.net(x).argmax(1)
    threat = mohs.Threat(mohs.Linf(0.1), draws=3)
    check(lambda: Job(make("PGD"), net, x, y, threat, restarts=2, batch=BATCH))


def test_what_is_restored_lies_in_memory_of_its_own() -> None:
    """Matrix products of memory that begins elsewhere than torch's own does are rounded otherwise."""
    tensors, text = through_a_file(waves.save(paused()))
    fresh = job("PGD", "linf:0.1")
    waves.restore(fresh, tensors, text)
    assert fresh.wave is not None
    for problem, state in fresh.wave.batches:
        for value in (problem.found.x, problem.found.score, *([] if state is None else [state.x])):
            assert value.data_ptr() % 64 == 0


# ---- what does not fit is refused, and the job stays as it was ---------------------------------------------------------


def paused(pauses: int = 6, **settings: Any) -> Job:
    half = job("PGD", "linf:0.1", **settings)
    for at, _ in enumerate(half.run()):
        if at == pauses:
            break
    return half


def _edit(text: str, *path: Any, to: Any) -> str:
    head = json.loads(text)
    inner = head
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return json.dumps(head)


def _first(text: str, *path: Any) -> str:
    inner = json.loads(text)
    for key in path:
        inner = inner[key]
    return inner["tensor"]


BATCHES = ("wave", "batches", "list", 0, "list")
STRAY: list[tuple[str, Any]] = [
    ("not json", lambda t, s: (t, "{")),
    ("waiting examples that are not there", lambda t, s: (t | {"job.waiting": t["job.waiting"] + 99}, s)),
    ("an answer that is no row", lambda t, s: (t | {"job.answer": t["job.answer"] - 9}, s)),
    ("a step beyond the last", lambda t, s: (t, _edit(s, "wave", "k", to=99))),
    ("a step without end", lambda t, s: (t, _edit(s, "wave", "k", to=math.inf))),
    ("a batch beyond the last", lambda t, s: (t, _edit(s, "wave", "at", to=-1))),
    ("a point of another width", lambda t, s: (t | {_first(s, *BATCHES, 4, "fields", "x"): torch.zeros(4, 5)}, s)),
    ("a warm start from nowhere", lambda t, s: (t, _edit(s, *BATCHES, 3, to={"tensor": "job.margin"}))),
    ("no wave's batches", lambda t, s: (t, _edit(s, "wave", "batches", to={"value": 3}))),
    ("a class that is no Rows", lambda t, s: (t, _edit(s, *BATCHES, 4, "rows", to="os.system"))),
    ("a class that is not there", lambda t, s: (t, _edit(s, *BATCHES, 4, "rows", to="builtins.Exception"))),
    ("a field too many", lambda t, s: (t, _edit(s, *BATCHES, 4, "fields", "more", to={"value": 1}))),
    ("a missing tensor", lambda t, s: ({k: v for k, v in t.items() if k != "job.answer"}, s)),
    ("another length", lambda t, s: (t | {"job.answer": t["job.answer"][:-1]}, s)),
    ("another dtype", lambda t, s: (t | {"job.margin": t["job.margin"].double()}, s)),
    ("examples that are not there", lambda t, s: (t | {_first(s, *BATCHES, 0): t[_first(s, *BATCHES, 0)] + 99}, s)),
    ("rows that are not there", lambda t, s: (t | {_first(s, *BATCHES, 1): t[_first(s, *BATCHES, 1)] + 99}, s)),
    ("findings of another shape", lambda t, s: (t | {"wave.0.2.x": t["wave.0.2.x"][:, :-1]}, s)),
    ("kept points of another shape", lambda t, s: (t | {"kept.0": torch.arange(50)}, s)),
]  # fmt: skip


@pytest.mark.parametrize("spoil", [s for _, s in STRAY], ids=[n for n, _ in STRAY])
def test_what_does_not_fit_is_refused_and_changes_nothing(spoil: Any) -> None:
    tensors, text = through_a_file(waves.save(paused()))
    fresh, whole = job("PGD", "linf:0.1"), job("PGD", "linf:0.1")
    with pytest.raises(ValueError, match="does not fit the job"):
        waves.restore(fresh, *spoil(tensors, text))
    for each in (fresh, whole):
        for _ in each.run():
            pass
    assert_ends_alike(whole, fresh, torch.arange(ROWS))


def test_of_another_job_is_refused() -> None:
    saved = through_a_file(waves.save(paused()))
    for other in (job("PGD", "linf:0.1", restarts=3), job("PGD", "linf:0.1", batch=8)):
        with pytest.raises(ValueError, match="does not fit the job"):
            waves.restore(other, *saved)


def test_a_state_that_holds_more_than_tensors_cannot_be_saved() -> None:
    @dataclass
    class Odd(State):
        memory: Any = None

    class OddPGD(PGD):
        def init(self, problem: Any) -> Any:
            state = super().init(problem)
            return Odd(state.x, memory={"a set": {1}})

        def step(self, problem: Any, state: Any, k: int) -> Any:
            return Odd(super().step(problem, state, k).x, memory=state.memory)

    net, x = relu_net((6,)), inputs(ROWS, 6)
    half = Job(OddPGD(steps=4), net, x, net(x).argmax(1), Threat.parse("linf:0.1"))
    next(half.run())
    with pytest.raises(TypeError, match=r"a set cannot be saved \(wave\.0\.4\.memory\.a set\)"):
        waves.save(half)
    assert issubclass(Odd, Rows)

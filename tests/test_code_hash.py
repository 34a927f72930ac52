"""The hash of a model's code: what changes it, what does not, and that it is the same in every process."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mohs import models
from mohs.models import code_hash, weights_hash
from mohs.models.code import code_parts, hash_of_parts

GIVEN = """
import torch
from torch import nn

FACTOR = 2.0

def helper(x):
    return x * 1.5

class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x * 7).round() / 7

class Net(nn.Module):
    SHIFT = 3

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)
        self.kind = "plain"
        self.mask = torch.ones(4)

    def forward(self, x):
        '''What it says.'''
        if self.kind in {"plain", "other", "third", "fourth"}:
            x = x * FACTOR
        return self.net(Round.apply(helper(x))) + self.scaled(x)[:, :2] + self.SHIFT

    def scaled(self, x, by=0.25):
        return (lambda z: z * by)(x)
"""


def net(old: str = "", new: str = "", text: str = GIVEN) -> nn.Module:
    """The model of a source text in which a part was replaced."""
    assert old in text
    space: dict[str, Any] = {"__name__": "somewhere"}
    exec(compile(text.replace(old, new), "a.py", "exec"), space)
    torch.manual_seed(0)
    found = space["Net"]()
    assert isinstance(found, nn.Module)
    return found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("FACTOR = 2.0", "FACTOR = 2.5"),
        ("x * 1.5", "x * 1.25"),
        ("x * 7", "x * 6"),
        ("SHIFT = 3", "SHIFT = 4"),
        ('self.kind = "plain"', 'self.kind = "fifth"'),
        ("torch.ones(4)", "torch.zeros(4)"),
        ('"fourth"', '"fifth"'),
        ("by=0.25", "by=0.5"),
        ("lambda z: z * by", "lambda z: z + by"),
        ("self.net(", "-self.net("),
        ("class Net(nn.Module):", "class Net(nn.Module):\n    def extra(self):\n        return 1"),
    ],
)
def test_another_constant_is_another_model(old: str, new: str) -> None:
    one, other = net(), net(old, new)
    assert weights_hash(one) == weights_hash(other)
    assert repr(one) == repr(other)
    assert code_hash(one) != code_hash(other)


@pytest.mark.parametrize(
    ("old", "new"), [("What it says.", "Otherwise."), ("FACTOR = 2.0", "\n\n# moved\nFACTOR = 2.0"), ("", "")]
)
def test_words_and_places_do_not_count(old: str, new: str) -> None:
    assert code_hash(net()) == code_hash(net(old, new)) if old else code_hash(net()) == code_hash(copy.deepcopy(net()))


def test_weights_and_modes_do_not_count() -> None:
    one = net()
    before = code_hash(one)
    with torch.no_grad():
        for p in one.parameters():
            p.zero_()
    assert code_hash(one.train()) == before == code_hash(one.eval().requires_grad_(False))


def test_the_same_in_every_process(tmp_path: Path) -> None:
    (tmp_path / "given.py").write_text(GIVEN, encoding="utf-8")
    ask = (
        "import given\nfrom mohs import defenses, models\nfrom torch import nn\n"
        "net = given.Net(); net.words = {'a', 'b', 'c'}; net.said = str(object())\n"
        "net.free = lambda x: x in {'u', 'v', 'w'}\n"
        "guarded = defenses.JPEG(75)(models.load('bundled:fashion-natural'))\n"
        "print(models.code_hash(net), models.code_hash(guarded))"
    )
    said = []
    for seed in ("1", "2"):
        paths = os.pathsep.join([str(tmp_path), *sys.path])
        more = {
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
        }  # the second reads what the first compiled
        ran = subprocess.run(
            [sys.executable, "-c", ask], env=os.environ | more, capture_output=True, text=True, check=True
        )
        said.append(ran.stdout.split())
    assert said[0] == said[1]
    assert len({*said[0]}) == 2
    assert all(len(text) == 64 for text in said[0])


@dataclass(frozen=True)
class Setting:
    """A setting with code of its own."""

    strength: float
    steps: tuple[int, ...] = (1, 2)

    def apply(self, x: Tensor) -> Tensor:
        return x * self.strength


class Holder(nn.Module):
    """A model with one attribute."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return x


def closed(over: Any) -> Any:
    return lambda x: x * over


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        (1, 1, True),
        (1.0, 1.0, 1),
        ("a", "a", b"a"),
        (None, None, 0),
        ((1, (2.0, "x")), (1, (2.0, "x")), (1, (2.5, "x"))),
        ([1, 2], [1, 2], [2, 1]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 3}),
        (frozenset({"u", "v"}), frozenset({"v", "u"}), frozenset({"u", "w"})),
        (Setting(0.5), Setting(0.5), Setting(0.5, (1, 3))),
        (torch.arange(3), torch.arange(3), torch.arange(3) + 1),
        (torch.arange(3), torch.arange(3), torch.arange(3).int()),
        (partial(max, 3, key=abs), partial(max, 3, key=abs), partial(max, 4, key=abs)),
        (closed(2), closed(2), closed(3)),
        (nn.Linear(1, 1).weight.dtype, torch.float32, torch.float64),
        ([nn.ReLU()], [nn.ReLU()], [nn.GELU()]),
    ],
)
def test_plain_attributes_count(one: Any, same: Any, other: Any) -> None:
    assert code_hash(Holder(one)) == code_hash(Holder(same))
    assert code_hash(Holder(one)) != code_hash(Holder(other))


def test_a_container_may_hold_itself_or_its_model() -> None:
    ring: list[Any] = [1]
    ring.append(ring)
    model = Holder(ring)
    model.__dict__["other"] = [model, Holder([model])]
    assert code_hash(model) == code_hash(model)


class Counting(nn.Module):
    """Everything that forward() keeps for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.grid, self.seen, self.cache, self.scale = 0, None, [], {}, 1.0
        self.box = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self._note(x)
        if self.grid is None:
            self.grid = torch.zeros_like(x)
        return x * self.scale

    def _note(self, x: Tensor) -> None:
        self.seen.append(len(x))
        self.cache[tuple(x.shape)] = x

    def set(self, scale: float) -> None:
        self.scale = scale


def test_state_does_not_count_and_settings_do() -> None:
    model = Counting()
    before = code_hash(model)
    model(torch.ones(2, 3))
    model(torch.ones(3, 3))
    assert code_hash(model) == before
    model.set(2.0)
    assert code_hash(model) != before


def test_what_a_forward_changes_is_left_out() -> None:
    model = Counting()
    box = model.box
    before = code_parts(model)
    box[0] = 5  # by whatever the forward calls
    after = code_parts(model)
    box[0] = 6
    again = code_parts(model)
    assert hash_of_parts(before) != hash_of_parts(after)
    assert hash_of_parts(before, after) == hash_of_parts(after, again)


def test_another_forward_of_the_instance_and_hooks_count() -> None:
    plain, patched, hooked = Holder(1), Holder(1), Holder(1)
    patched.__dict__["forward"] = lambda x: -x
    hooked.register_forward_hook(lambda module, args, out: -out)
    assert len({code_hash(m) for m in (plain, patched, hooked)}) == 3


def test_it_takes_milliseconds() -> None:
    model = nn.Sequential(*[Holder(Setting(i)) for i in range(100)], models.load("bundled:fashion-natural"))
    code_hash(model)
    began = time.process_time()
    code_hash(model)
    assert time.process_time() - began < 0.25


def test_what_a_model_says_of_its_training_is_not_its_code() -> None:
    one, other = (nn.Sequential(nn.Linear(2, 2)) for _ in range(2))
    other.__dict__["trained_against"] = "PGD(steps=7)"
    assert code_hash(one) == code_hash(other)

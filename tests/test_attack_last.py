"""The last iterate of an attack, as training takes it: by hand, its passes, and what is refused; and mixed precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from core_models import inputs, relu_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from training_problem import CLASSES, FEATURES, mixed_net, recipe, run

import mohs
from mohs.attacks import BIM, FGSM, MIFGSM, PGD, DeepFool, Stop
from mohs.defenses.training import Last, Mixture, OnEmbeddings, Saddle
from mohs.errors import ThreatError, UsageError
from mohs.evaluation.training import perturb
from mohs.objectives import margin

SHAPE, EPS = (1, 4, 4), 0.07


def problem(rows: int = 12) -> tuple[nn.Module, Tensor, Tensor]:
    net = relu_net(SHAPE).double()
    x = inputs(rows, *SHAPE, seed=3).double()
    with torch.no_grad():
        return net, x, net(x).argmax(1)


def by_hand(net: nn.Module, x: Tensor, y: Tensor, steps: int, size: float, eps: float) -> Tensor:
    """Signed steps along the gradient of the cross-entropy, clipped to the cube and to [0, 1]."""
    at = x.clone()
    for _ in range(steps):
        at.requires_grad_(True)
        (slope,) = torch.autograd.grad(nn.functional.cross_entropy(net(at), y), at)
        at = (at.detach() + size * slope.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return at


@given(st.integers(1, 6), st.floats(0.005, 0.1), st.sampled_from([None, 5, 12]))
@settings(max_examples=20, deadline=None)
def test_it_is_where_the_steps_end(steps: int, size: float, batch: int | None) -> None:
    net, x, y = problem()
    attack = PGD(steps, size, random_start=False)
    out = mohs.attack(attack, net, x, y, f"linf:{EPS}", stop=Stop.LAST, batch=batch)
    assert torch.allclose(out.x, by_hand(net, x, y, steps, size, EPS), atol=1e-12)
    assert out.forwards.tolist() == out.backwards.tolist() == [steps] * len(x)
    assert out.spent == 2 * steps * len(x)
    assert not out.success.any(), "nothing was judged"
    assert out.size.isinf().all()


def test_one_step_stays_one_step_though_the_clean_input_is_wrong() -> None:
    net, x, y = problem()
    wrong = (y + 1) % 3
    last = mohs.attack(FGSM(), net, x, wrong, f"linf:{EPS}", stop=Stop.LAST).x
    assert torch.allclose(last, by_hand(net, x, wrong, 1, EPS, EPS))


def test_a_random_start_is_that_of_any_other_run() -> None:
    net, x, y = problem()
    still = PGD(1, 1e-9)
    last = mohs.attack(still, net, x, y, f"linf:{EPS}", stop=Stop.LAST, seed=7).x
    other = mohs.attack(still, net, x, y, f"linf:{EPS}", stop=Stop.LAST, seed=8).x
    assert torch.allclose(last, mohs.attack(still, net, x, y, f"linf:{EPS}", stop=Stop.LAST, seed=7, batch=5).x)
    assert float((last - other).abs().max()) > EPS / 10
    best = mohs.attack(still, net, x, y, f"linf:{EPS}", stop=Stop.BUDGET, seed=7).x
    assert torch.allclose(last, best, atol=1e-7)


@pytest.mark.parametrize(
    ("attack", "threat", "more", "error", "says"),
    [
        (PGD(2), f"linf:{EPS}", {"restarts": 2}, UsageError, "one try"),
        (PGD(2, objective=margin), f"linf:{EPS}", {"aims": 2}, UsageError, "without aims"),
        (MIFGSM(2), f"linf:{EPS}", {}, UsageError, "only moves along gradients"),
        (DeepFool(), "l2:inf", {}, UsageError, "need each look"),
        (PGD(2), "linf:inf", {}, ThreatError, "finite radius"),
    ],
)
def test_what_has_no_last_iterate_is_refused(
    attack: Any, threat: str, more: dict[str, Any], error: type[Exception], says: str
) -> None:
    net, x, y = problem()
    with pytest.raises(error, match=says):
        mohs.attack(attack, net, x, y, threat, stop=Stop.LAST, **more)


def test_no_example_is_no_point() -> None:
    net, x, y = problem()
    assert mohs.attack(PGD(2), net, x[:0], y[:0], f"linf:{EPS}", stop=Stop.LAST).x.shape == x[:0].shape


def test_the_saddle_point_trains_on_the_last_iterate_unless_told(tmp_path: Path) -> None:
    asked: list[object] = []

    def watching(attack: Any, model: nn.Module, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        asked.append(attack)
        return x

    for objective in (Saddle(BIM(2)), Saddle(BIM(2), keep="best")):
        run(tmp_path, objective, how=watching, threat="linf:0.1", epochs=1, out=objective.keep)
    assert set(map(repr, asked)) == {repr(Last(BIM(2))), repr(BIM(2))}
    with pytest.raises(UsageError, match="'last' or 'best'; got 'first'"):
        Saddle(BIM(2), keep="first")


@pytest.mark.parametrize(("attack", "forwards"), [(BIM(3), 3), (MIFGSM(3), 4)])
def test_a_look_is_saved_where_the_iterate_is_a_point(attack: Any, forwards: int) -> None:
    net, x, y = problem()
    seen: list[int] = []
    net.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    settings: dict[str, Any] = {"eps": x.new_full((len(x),), EPS), "seed": 0, "batch": len(x)}
    points = perturb(Last(attack), net, x, y, mohs.Threat.parse(f"linf:{EPS}"), **settings)
    assert len(seen) == forwards
    assert float((points - x).abs().max()) <= EPS + 1e-12


class Noted(nn.Linear):
    """Remembers in what precision it answered."""

    def __init__(self) -> None:
        super().__init__(FEATURES, CLASSES)
        self.seen: set[tuple[bool, torch.dtype]] = set()

    def forward(self, x: Tensor) -> Tensor:
        answer = super().forward(x)
        self.seen.add((self.training, answer.dtype))
        return answer


@pytest.mark.parametrize("objective", [Saddle(PGD(steps=2)), Mixture(FGSM())], ids=repr)
def test_mixed_precision_is_of_the_passes_alone(tmp_path: Path, objective: Any) -> None:
    net = Noted()
    trained = run(tmp_path, objective, how=perturb, model=net, threat="linf:0.05", precision="bfloat16")
    low, single = torch.bfloat16, torch.float32
    assert net.seen == {(True, low), (False, low), (False, single)}, "attack and loss; single where it is measured"
    assert "forward" not in net.__dict__
    assert trained.curve[-1]["loss"] < trained.curve[0]["loss"]


def test_after_an_error_the_net_is_as_it_was(tmp_path: Path) -> None:
    def never(*args: Any, **more: Any) -> Tensor:
        raise AssertionError("no attack")

    net = Noted()
    with pytest.raises(AssertionError, match="no attack"):
        run(tmp_path, Saddle(FGSM()), how=never, model=net, threat="linf:0.1", precision="bfloat16")
    assert "forward" not in net.__dict__


def test_a_forward_that_was_put_on_the_net_stays(tmp_path: Path) -> None:
    net, calls = mixed_net(), []
    plain = net.forward

    def counted(x: Tensor) -> Tensor:
        calls.append(len(x))
        return plain(x)

    net.__dict__["forward"] = counted
    run(tmp_path, model=net, precision="bfloat16", epochs=1)
    assert calls
    assert net.forward is counted


def test_what_calls_parts_of_a_net_is_refused() -> None:
    with pytest.raises(UsageError, match="OnEmbeddings calls parts of the net by themselves"):
        recipe(OnEmbeddings(Mixture(FGSM())), threat="l2:0.1", precision="bfloat16")


def test_another_precision_is_refused() -> None:
    assert "bfloat16" in repr(replace(recipe(), precision="bfloat16"))
    with pytest.raises(UsageError, match=r"precision of recipe 'tiny' was 'half'\. Allowed: 'float32', 'bfloat16'"):
        recipe(precision="half")


def test_it_learns_as_much(tmp_path: Path) -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        trained = run(tmp_path, model=mixed_net(), precision=precision, epochs=3, out=precision)
        losses[precision] = trained.curve[-1]["loss"]
    assert losses["float32"] != losses["bfloat16"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)

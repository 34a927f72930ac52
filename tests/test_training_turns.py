"""What happens to the weights in a step: AWP, free training, the average, and that all of it can be resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from training_problem import CLASSES, FEATURES, blobs, mixed_net, never, perturb, recipe, run, same

from mohs.attacks import FGSM, PGD, REGISTRY
from mohs.defenses.training import (
    AWP,
    SGD,
    TRADES,
    VAT,
    DeepContractive,
    Fast,
    Free,
    GaussianAugmentation,
    GradAlign,
    Natural,
    Progress,
    Saddle,
    Watch,
)
from mohs.defenses.training._quiet import number
from mohs.defenses.training.average import Average
from mohs.defenses.training.files import recipe_from_table
from mohs.errors import UsageError
from mohs.models import read_weights

Weights = dict[str, Tensor]


def state(model: nn.Module) -> Weights:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def equal(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@dataclass(frozen=True)
class Spy:
    """Natural training that notes the weights at each of its looks."""

    fail_at: int = -1
    weights: list[Weights] = field(default_factory=list, repr=False)
    attack: ClassVar[None] = None

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Any) -> Tensor:
        self.weights.append(state(model))
        if len(self.weights) - 1 == self.fail_at:
            raise RuntimeError("planted")
        return Natural().loss(model, x, y, context)


STILL = SGD(lr=1e-30, momentum=0.0)
"""No weight but zero feels such a step: after it they are what they were before, bit by bit."""


def test_awp_moves_each_weight_tensor_by_its_share_and_puts_it_back(tmp_path: Path) -> None:
    spy, net = Spy(), mixed_net()
    net[1].bias.data.fill_(0.5)
    before = state(net)
    run(tmp_path, AWP(spy, gamma=0.03), how=never, model=net, optimiser=STILL, epochs=1)
    assert len(spy.weights) == 10  # two looks in each of five steps
    for here, there in zip(spy.weights[::2], spy.weights[1::2], strict=True):
        for name, parameter in net.named_parameters():
            assert torch.equal(here[name], before[name])
            moved = there[name] - here[name]
            if parameter.dim() > 1:
                assert float(moved.norm() / here[name].norm()) == pytest.approx(0.03, rel=1e-4)
            else:
                assert not bool(moved.any())
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_awp_updates_along_the_gradient_at_the_moved_weights(tmp_path: Path) -> None:
    x, y = blobs()
    net = nn.Linear(FEATURES, CLASSES)
    w, b = net.weight.detach().double().numpy().copy(), net.bias.detach().double().numpy().copy()
    inputs, labels = x[:80].double().numpy(), np.eye(CLASSES)[y[:80].numpy()]

    def gradient(w: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        e = np.exp(inputs @ w.T + b)
        back = (e / e.sum(1, keepdims=True) - labels) / 80
        return back.T @ inputs, back.sum(0)

    up, _ = gradient(w, b)
    moved = w + 0.2 * np.linalg.norm(w) / np.linalg.norm(up) * up  # uphill
    g, h = gradient(moved, b)
    optimiser = SGD(lr=0.5, momentum=0.0)
    run(tmp_path, AWP(Natural(), gamma=0.2), how=never, model=net, optimiser=optimiser, epochs=1, batch=80)
    assert np.allclose(net.weight.detach().numpy(), w - 0.5 * g, atol=1e-6)
    assert np.allclose(net.bias.detach().numpy(), b - 0.5 * h, atol=1e-6)


@pytest.mark.parametrize(
    "objective", [Natural(), Saddle(PGD(steps=2)), TRADES(steps=2), GradAlign(Fast(), 0.1)], ids=repr
)
def test_awp_of_gamma_zero_is_the_objective_alone_bit_for_bit(tmp_path: Path, objective: Any) -> None:
    def trained(chosen: Any, out: str) -> nn.Module:
        return run(tmp_path, chosen, model=mixed_net(), threat="linf:0.1", epochs=1, batch=40, out=out).model

    bare = trained(objective, "a")  # batch statistics and dropout included
    assert same(trained(AWP(objective, gamma=0.0), "b"), bare)
    assert not same(trained(AWP(objective, gamma=0.1), "c"), bare)


def test_both_looks_of_awp_see_the_same_points(tmp_path: Path) -> None:
    attacked: list[int] = []

    def counting(*args: Any, **rest: Any) -> Tensor:
        attacked.append(len(args[2]))
        return perturb(*args, **rest)

    run(tmp_path, AWP(Saddle(FGSM()), 0.5), how=counting, threat="linf:0.1", epochs=1, out="a")
    assert attacked == [16] * 5
    seen: list[Tensor] = []

    class Seeing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                seen.append(x.detach().clone())
            return super().forward(x)

    run(
        tmp_path,
        AWP(TRADES(steps=1), 0.5),
        model=Seeing(FEATURES, CLASSES),
        threat="linf:0.1",
        epochs=1,
        batch=80,
        out="b",
    )
    clean, near, clean_again, near_again = seen
    assert torch.equal(clean, clean_again)
    assert torch.equal(near, near_again)
    assert not torch.equal(clean, near)


def test_awp_puts_weights_back_after_an_error(tmp_path: Path) -> None:
    net = mixed_net()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match="planted"):
        run(tmp_path, AWP(Spy(fail_at=1), gamma=0.5), how=never, model=net)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


# ---- free training ------------------------------------------------------------------------------------------------


def free_by_hand(net: nn.Linear, eps: float, length: float, replays: int, lr: float, size: int, epochs: int) -> Any:
    """Algorithm 1 on a linear net, in numpy; (weights, biases, change, mean loss of each epoch)."""
    x, y = (t[:80] for t in blobs())
    inputs, labels = x.double().numpy(), np.eye(CLASSES)[y.numpy()]
    w, b = net.weight.detach().double().numpy().copy(), net.bias.detach().double().numpy().copy()
    delta, curve = np.zeros((size, FEATURES)), []
    for epoch in range(epochs):
        order = torch.randperm(80, generator=torch.Generator().manual_seed(number(0, "order", epoch))).numpy()
        losses = []
        for begin in range(0, 80, size):
            rows = order[begin : begin + size]
            for _ in range(replays):
                points = np.clip(inputs[rows] + delta[: len(rows)], 0, 1)
                e = np.exp(points @ w.T + b)
                p = e / e.sum(1, keepdims=True)
                losses.append(-np.log((p * labels[rows]).sum(1)).mean())
                back = (p - labels[rows]) / len(rows)
                change = delta[: len(rows)] + length * eps * np.sign(back @ w)
                w, b = w - lr * back.T @ points, b - lr * back.sum(0)
                delta[: len(rows)] = np.clip(change, -eps, eps)
        curve.append(np.mean(losses))
    return w, b, delta, curve


@pytest.mark.parametrize(("length", "replays"), [(1.0, 3), (0.6, 2)])
def test_free_training_is_the_papers_algorithm(tmp_path: Path, length: float, replays: int) -> None:
    net = nn.Linear(FEATURES, CLASSES)
    w, b, delta, curve = free_by_hand(net, 0.1, length, replays, 0.2, 48, 2)
    trained = run(
        tmp_path, Free(replays, length), how=never, model=net, threat="linf:0.1", batch=48,
        optimiser=SGD(lr=0.2, momentum=0.0),
    )  # fmt: skip
    assert np.allclose(net.weight.detach().numpy(), w, atol=1e-5)
    assert np.allclose(net.bias.detach().numpy(), b, atol=1e-5)
    kept = load_file(tmp_path / "run" / "checkpoint.safetensors")["memory/free/change"]
    assert np.allclose(kept.numpy(), delta, atol=1e-6)
    assert [row["loss"] for row in trained.curve] == pytest.approx(curve, rel=1e-5)


def test_replays_draw_their_own_dropout(tmp_path: Path) -> None:
    masks: list[Tensor] = []

    class Seeing(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                masks.append(super().forward(torch.ones_like(x)))
            return super().forward(x)

    net = nn.Sequential(nn.Linear(FEATURES, 8), Seeing(0.5), nn.Linear(8, CLASSES))
    run(tmp_path, Free(3), model=net, threat="linf:0.1", epochs=1, batch=80)
    assert len({m.numpy().tobytes() for m in masks}) == len(masks) == 3


# ---- the average --------------------------------------------------------------------------------------------------


def mean_by_hand(values: list[Tensor], decay: float) -> Tensor:
    """The weighted mean, from its definition."""
    shares = [decay ** (len(values) - 1 - k) for k in range(len(values))]
    return sum(s * v.double() for s, v in zip(shares, values, strict=True)) / sum(shares)


def test_the_average_of_constant_weights_is_these_weights() -> None:
    net = mixed_net()
    for decay in (0.1, 0.999):
        average = Average(decay, mixed_net())
        for n in range(1, 6):
            average.add(net, n)
            assert equal(average.state, state(net))


def test_the_average_is_the_weighted_mean_of_all_steps() -> None:
    net = nn.BatchNorm1d(4)
    average, seen = Average(0.7, net), []
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 8):
        net.weight.data.normal_(generator=generator)
        net.running_var.uniform_(generator=generator)
        net.num_batches_tracked.fill_(n)
        average.add(net, n)
        seen.append(state(net))
    for name in ("weight", "running_var"):
        assert torch.allclose(average.state[name].double(), mean_by_hand([s[name] for s in seen], 0.7), atol=1e-6)
    assert int(average.state["num_batches_tracked"]) == 7


def test_the_average_is_worn_and_taken_off() -> None:
    net = mixed_net()
    average, own = Average(0.5, nn.Sequential(*mixed_net())), state(net)
    average.state["0.weight"].fill_(2.0)

    def fail_inside() -> None:
        with average.worn(net):
            assert equal(state(net), average.state)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert equal(state(net), own)


def test_the_average_is_what_a_training_measures_saves_and_returns(tmp_path: Path) -> None:
    net, steps, watched = mixed_net(), [], []

    def noting(told: Progress) -> None:
        steps.append(state(net))

    def watching(attack: Any, model: nn.Module, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        watched.append(state(model))
        return x

    trained = run(
        tmp_path, Saddle(FGSM()), how=lambda attack, *rest, **more: watching(attack, *rest, **more), model=net,
        threat="linf:0.1", averaging=0.8, progress=noting, watch=Watch(PGD(), PGD()),
    )  # fmt: skip
    assert len(steps) == 10
    for name in ("0.weight", "1.bias", "1.running_mean"):
        end = mean_by_hand([s[name] for s in steps], 0.8)
        assert torch.allclose(trained.model.state_dict()[name].double(), end, atol=1e-6)
        assert not torch.allclose(trained.model.state_dict()[name], steps[-1][name], atol=1e-4)
        # an epoch: a look in each of five steps, then two of the watch
        middle = mean_by_hand([s[name] for s in steps[:5]], 0.8)
        assert torch.allclose(watched[5][name].double(), middle, atol=1e-6)
        assert torch.equal(watched[7][name], steps[4][name])  # training goes on from the weights themselves
    assert equal(dict(read_weights(trained.weights)), state(trained.model))
    again = run(
        tmp_path,
        Saddle(FGSM()),
        model=mixed_net(),
        threat="linf:0.1",
        averaging=0.8,
        watch=Watch(PGD(), PGD()),
        how=never,
    )
    assert same(again.model, trained.model)


def test_training_itself_does_not_see_the_average(tmp_path: Path) -> None:
    last: list[Weights] = []

    def final(averaging: float | None, out: str) -> Weights:
        net = mixed_net()
        run(tmp_path, model=net, averaging=averaging, progress=lambda p: last.append(state(net)), out=out)
        return last[-1]

    assert equal(final(None, "a"), final(0.9, "b"))


@pytest.mark.parametrize("decay", [0, 1, 0.0, 1.0, -0.5, 1.5, float("nan"), True, "0.9"])
def test_decays_outside_the_open_interval_are_refused(decay: Any) -> None:
    with pytest.raises(UsageError, match=r"averaging of recipe 'tiny'.*above 0 and below 1"):
        recipe(averaging=decay)


# ---- interrupted, and spread over processes -----------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [3, 8])
@pytest.mark.parametrize(
    "objective",
    [Free(2), AWP(TRADES(steps=1), 0.1), VAT(iterations=2), DeepContractive(0.1), GaussianAugmentation(0.1)],
    ids=repr,
)
def test_a_resumed_training_ends_in_the_same_bytes(tmp_path: Path, objective: Any, at: int) -> None:
    from mohs.defenses.training import train

    def go(out: str, progress: Callable[[Progress], None] | None = None) -> Path:
        plan = recipe(objective, threat="linf:0.1", averaging=0.7, batch=18)
        train(plan, perturb=perturb, out=tmp_path / out, data=blobs(), model=mixed_net(), device="cpu",
              checkpoint_every=2, progress=progress)  # fmt: skip
        return tmp_path / out

    told: list[Progress] = []

    def die(p: Progress) -> None:
        told.append(p)
        if len(told) == at:
            raise Killed

    with pytest.raises(Killed):
        go("killed", die)
    killed, whole = go("killed"), go("whole")
    for name in ("weights", "checkpoint"):
        a, b = load_file(killed / f"{name}.safetensors"), load_file(whole / f"{name}.safetensors")
        assert equal(a, b)
    assert any(name.startswith("average/") for name in b)
    assert ("memory/free/change" in b) == isinstance(objective, Free)


# ---- recipes ------------------------------------------------------------------------------------------------------


def test_toml_recipes_know_the_objectives() -> None:
    rest = {"name": "t", "data": "d", "net": "linear", "epochs": 1, "threat": "linf:0.1"}

    def read(objective: Any, **more: Any) -> Any:
        return recipe_from_table({**rest, **more, "objective": objective}, REGISTRY, "here")

    assert read({"name": "trades", "beta": 1.0, "steps": 40}).objective == TRADES(steps=40, beta=1.0)
    assert read("fast").objective == Fast()
    assert read({"name": "free", "replays": 4}, averaging=0.99).averaging == 0.99
    wrapped = {
        "name": "awp",
        "gamma": 0.02,
        "objective": {"name": "gradalign", "objective": {"name": "saddle", "attack": "fgsm"}},
    }
    assert read(wrapped).objective == AWP(GradAlign(Saddle(FGSM())), 0.02)
    for wrong, said in (
        ({"name": "awp"}, "AWP also needs objective"),
        ({"name": "awp", "objective": "lion"}, r"\[objective\], objective: name was 'lion'; allowed are natural"),
        ({"name": "awp", "objective": "free"}, "AWP adds to a loss"),
        ({"name": "mart", "beta": 3.0}, "attack was None"),
        ({"name": "trades", "beta": -1}, "beta of TRADES"),
    ):
        with pytest.raises(UsageError, match=said):
            read(wrong)
    with pytest.raises(UsageError, match=r"averaging was '0\.9'; allowed: float"):
        read("natural", averaging="0.9")

"""Fine-tuning on a training set that was perturbed once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_problem import CLASSES, FEATURES, blobs, mixed_net, never, perturb, recipe, run, same

from mohs.attacks import FGSM, PGD, REGISTRY, DeepFool
from mohs.defenses.training import AWP, SGD, Cascade, Ensemble, FineTune, Mixture, Natural, Watch
from mohs.defenses.training import loop as training_loop
from mohs.defenses.training._quiet import number
from mohs.defenses.training.files import recipe_from_table
from mohs.errors import RecordError, UsageError

TRAINED = slice(80)
"""The examples of the problem that are not held out."""


class Noting:
    """A stand-in for attacks that moves every row by +0.1 and notes how it is asked."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self, attack: Any, model: nn.Module, x: Tensor, y: Tensor, threat: Any, *, eps: Tensor, seed: int, batch: int
    ) -> Tensor:
        weights = [p.detach().clone() for p in model.parameters()]
        training = any(m.training for m in model.modules())
        self.calls.append({"x": x, "eps": eps, "weights": weights, "training": training, "attack": attack})
        return x + 0.1


def by_hand(w: np.ndarray, b: np.ndarray, x: np.ndarray, lr: float, epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """Plain gradient descent on the cross-entropy of a linear net, batches of 16."""
    labels = np.eye(CLASSES)[blobs().y[TRAINED].numpy()]
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(number(0, "order", epoch))).numpy()
        for begin in range(0, len(x), 16):
            rows = order[begin : begin + 16]
            e = np.exp(x[rows] @ w.T + b)
            back = (e / e.sum(1, keepdims=True) - labels[rows]) / len(rows)
            w, b = w - lr * back.T @ x[rows], b - lr * back.sum(0)
    return w, b


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_it_trains_on_the_scaled_points_alone_in_every_epoch(tmp_path: Path, scale: float) -> None:
    net, how = nn.Linear(FEATURES, CLASSES), Noting()
    w, b = net.weight.detach().double().numpy().copy(), net.bias.detach().double().numpy().copy()
    points = np.clip(blobs().x[TRAINED].double().numpy() + 0.1 * scale, 0, 1)
    run(
        tmp_path, FineTune(DeepFool(), scale), how=how, model=net, threat="l2:inf", epochs=3,
        optimiser=SGD(lr=0.5, momentum=0.0),
    )  # fmt: skip
    w, b = by_hand(w, b, points, 0.5, 3)
    assert np.allclose(net.weight.detach().numpy(), w, atol=1e-5)
    assert np.allclose(net.bias.detach().numpy(), b, atol=1e-5)


def test_the_set_is_perturbed_once_with_the_net_as_it_came(tmp_path: Path) -> None:
    net, how = mixed_net(), Noting()
    before = [p.detach().clone() for p in net.parameters()]
    run(tmp_path, FineTune(FGSM()), how=how, model=net, threat="linf:0.2", warmup=2, epochs=3, holdout=10)
    (call,) = how.calls
    assert torch.equal(call["x"], blobs().x[TRAINED])
    assert call["attack"] == FGSM()
    assert all(torch.equal(p, q) for p, q in zip(call["weights"], before, strict=True))
    assert not call["training"]
    assert call["eps"].tolist() == pytest.approx([0.2] * 80)  # the whole radius, warm-up or not


def test_points_do_not_depend_on_how_many_are_made_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(out: str) -> nn.Module:
        objective = FineTune(PGD(steps=2))
        return run(tmp_path, objective, model=mixed_net(), threat="linf:0.1", epochs=1, out=out).model

    whole = trained("a")
    monkeypatch.setattr(training_loop, "CHUNK", 1)
    assert same(trained("b"), whole)
    assert not same(run(tmp_path, model=mixed_net(), epochs=1, out="c").model, whole)


def test_with_deepfool_a_linear_net_is_trained_on_its_decision_boundary(tmp_path: Path) -> None:
    x, y = (t[TRAINED] for t in blobs())
    first = run(tmp_path, epochs=4, out="first").model
    kept: list[Tensor] = []

    class Keeping(FineTune):
        def prepare(self, *args: Any) -> Tensor:
            kept.append(super().prepare(*args))
            return kept[-1]

    for k, scale in enumerate((1.0, 2.0)):
        run(tmp_path, Keeping(DeepFool(), scale), threat="l2:inf in [-9, 9]", start=first, epochs=1, out=str(k))
    w, z = first[1].weight.detach().double().numpy(), first(x).detach().double().numpy()
    nearest = np.full(len(x), np.inf)
    for k in range(CLASSES):
        norm = np.linalg.norm(w - w[k], axis=1)[y.numpy()]
        gap = z[np.arange(len(x)), y.numpy()] - z[:, k]
        nearest = np.where(y.numpy() == k, nearest, np.minimum(nearest, gap / np.where(norm > 0, norm, 1)))
    nearest = np.maximum(nearest, 0)  # what is wrong already stays where it is
    for points, scale in zip(kept, (1.0, 2.0), strict=True):
        size = (points - x).norm(dim=1).double().numpy()
        assert np.all(size >= scale * nearest * 0.999)
        assert np.all(size <= scale * nearest * 1.03 + 1e-4)  # the overshoot


def test_a_scale_of_zero_is_natural_training_bit_for_bit(tmp_path: Path) -> None:
    zero = run(tmp_path, FineTune(FGSM(), 0), how=never, model=mixed_net(), threat="linf:0.1", out="a")
    assert same(zero.model, run(tmp_path, model=mixed_net(), threat="linf:0.1", out="b").model)


def test_the_smallest_change_needs_no_radius_and_is_not_watched(tmp_path: Path) -> None:
    objective, first = FineTune(DeepFool(steps=3)), recipe().build_net()
    watch = Watch(FGSM(), PGD(steps=2))
    trained = run(tmp_path, objective, threat="l2:inf", start=first, watch=watch, epochs=1)
    lines = (tmp_path / "run" / "curve.jsonl").read_text().splitlines()

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    (row,) = [json.loads(line, parse_constant=refuse) for line in lines]
    assert row["eps"] is None
    assert "many_steps" not in row
    assert trained.model.trained_against == repr(DeepFool(steps=3))
    watched = run(tmp_path, objective, threat="l2:0.2", start=first, watch=watch, epochs=1, out="b").curve[0]
    assert watched["eps"] == pytest.approx(0.2)
    assert "many_steps" in watched
    with pytest.raises(UsageError, match="finite radius"):
        recipe(FineTune(FGSM()), threat="linf:inf", start=first)
    with pytest.raises(UsageError, match="finite radius"):
        recipe(FineTune(DeepFool()), start=first)
    with pytest.raises(UsageError, match="finite radius"):
        recipe(Mixture(DeepFool()), threat="l2:inf", start=first)


def test_it_goes_on_from_a_trained_net_or_not_at_all(tmp_path: Path) -> None:
    for objective in (FineTune(FGSM()), AWP(FineTune(FGSM()))):
        with pytest.raises(UsageError, match=r"goes on from a trained net.*start='bundled:fashion-natural'"):
            run(tmp_path, objective, how=never, threat="linf:0.1")
    for wrong in (-1, float("nan"), "2", True):
        with pytest.raises(UsageError, match="scale of FineTune"):
            FineTune(FGSM(), wrong)
    for wrap in (lambda o: Ensemble(o, (nn.Linear(1, 1),)), lambda o: Cascade(o, FGSM(), nn.Linear(1, 1))):
        with pytest.raises(UsageError, match="FineTune runs none in its steps"):
            wrap(FineTune(FGSM()))


def test_inside_awp_the_points_are_made_as_well(tmp_path: Path) -> None:
    def trained(objective: Any, out: str) -> nn.Module:
        return run(tmp_path, objective, how=Noting(), model=mixed_net(), threat="linf:0.1", out=out).model

    bare = trained(FineTune(FGSM()), "a")
    assert same(trained(AWP(FineTune(FGSM()), 0.0), "b"), bare)
    assert not same(trained(AWP(Natural(), 0.0), "c"), bare)


class Killed(Exception):
    pass


def test_a_resumed_fine_tuning_ends_in_the_same_bytes(tmp_path: Path) -> None:
    first, other = mixed_net().eval(), nn.Sequential(*mixed_net())
    other[0].weight.data.mul_(2)

    def go(out: str, model: nn.Module, last: int = 99) -> nn.Module:
        told: list[Any] = []

        def die(p: Any) -> None:
            told.append(p)
            if len(told) == last:
                raise Killed

        trained = run(
            tmp_path, FineTune(PGD(steps=2), 2.0), model=model, threat="linf:0.1", epochs=3, progress=die, out=out,
            how=perturb,
        )  # fmt: skip
        return trained.model

    def fresh() -> nn.Module:
        made = mixed_net()
        made.load_state_dict(first.state_dict())
        return made

    with pytest.raises(Killed):
        go("killed", fresh(), last=8)  # after the checkpoint of the first epoch: the weights have moved
    with pytest.raises(RecordError, match="another run"):
        go("killed", other)
    assert same(go("killed", fresh()), go("whole", fresh()))


def test_recipes_know_it() -> None:
    rest = {"name": "t", "data": "d", "net": "small_cnn", "epochs": 5, "start": "bundled:fashion-natural"}

    def read(objective: Any, threat: str = "l2:inf") -> Any:
        return recipe_from_table({**rest, "threat": threat, "objective": objective}, REGISTRY, "here")

    table = {"name": "finetune", "attack": "DeepFool", "scale": 2, "steps": 20}
    assert read(table).objective == FineTune(DeepFool(steps=20), 2)
    assert read({"name": "finetune", "attack": "fgsm"}, "linf:0.1").objective == FineTune(FGSM())
    assert read("natural").objective == Natural()
    with pytest.raises(UsageError, match="finite radius"):
        read({"name": "finetune", "attack": "fgsm"})
    with pytest.raises(UsageError, match="attack was None"):
        read("finetune")

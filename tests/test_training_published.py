"""Published training objectives beside their formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_formulas import (
    Array,
    Weights,
    agrees,
    batch,
    fixed,
    input_gradients,
    net,
    probabilities,
    room,
    weights,
)
from training_problem import CLASSES, FEATURES, mixed_net, never, run, same

from mohs.attacks import FGSM, PGD
from mohs.defenses.training import AWP, MART, NFGSM, TRADES, VAT, Context, Fast, Free, GradAlign, Natural, Saddle
from mohs.errors import UsageError

# ---- TRADES -------------------------------------------------------------------------------------------------------


def trades_by_hand(beta: float, turned: bool = False, frozen: Weights | None = None) -> Callable[[Weights], float]:
    """The formula; with the divergence the wrong way round, or with the answer at the input as given by ``frozen``."""
    x, near, y = (t.numpy() for t in batch())

    def f(w: Weights) -> float:
        p, q = probabilities(frozen or w, x), probabilities(w, near)
        p, q = (q, p) if turned else (p, q)
        right = probabilities(w, x)[np.arange(len(y)), y]
        return float(-np.log(right).mean() + beta * (p * (np.log(p) - np.log(q))).sum() / len(y))

    return f


@pytest.mark.parametrize("beta", [0.5, 6.0])
def test_trades_is_the_papers_formula_and_differentiates_both_answers(beta: float) -> None:
    context = fixed(batch()[1])
    assert agrees(TRADES(beta=beta), context, trades_by_hand(beta))
    assert not agrees(TRADES(beta=beta), context, trades_by_hand(beta, frozen=weights(net())))
    x, _, y = batch()
    turned = trades_by_hand(beta, turned=True)(weights(net()))
    assert abs(TRADES(beta=beta).loss(net(), x, y, context).item() - turned) > 1e-5  # the direction can be told


def back(point: Array, clean: Array, eps: float, euclidean: bool) -> Array:
    """Into the box and the region: the cube, or the ball, by shrinking the change."""
    change = np.clip(point, 0, 1) - clean
    if not euclidean:
        return clean + np.clip(change, -eps, eps)
    size = np.linalg.norm(change, axis=1, keepdims=True)
    return clean + change * np.minimum(1, eps / size)


@pytest.mark.parametrize("step_size", [None, 0.03])
@pytest.mark.parametrize("euclidean", [False, True])
def test_trades_climbs_the_divergence_from_noise_and_stays_in_the_region(
    step_size: float | None, euclidean: bool
) -> None:
    x, _, _ = batch()
    eps = 0.5 if euclidean else 0.1
    model, here = net(), room(f"l2:{eps}" if euclidean else f"linf:{eps}")
    w, clean = weights(model), x.numpy()
    p = probabilities(w, clean)
    point = back(clean + 0.001 * here.normal(x).numpy(), clean, eps, euclidean)
    for _ in range(3):
        rise = np.zeros_like(point)
        for k in range(FEATURES):
            ahead, behind = point.copy(), point.copy()
            ahead[:, k] += 1e-6
            behind[:, k] -= 1e-6
            for where, sign in ((ahead, 1), (behind, -1)):
                rise[:, k] += sign * (p * (np.log(p) - np.log(probabilities(w, where)))).sum(1)
        steepest = rise / np.linalg.norm(rise, axis=1, keepdims=True) if euclidean else np.sign(rise)
        point = back(point + (step_size or 2.5 * eps / 3) * steepest, clean, eps, euclidean)
    found = TRADES(steps=3, step_size=step_size).points(model, x, here)
    assert np.allclose(found.numpy(), point, atol=1e-6 if euclidean else 1e-12)
    assert all(q.grad is None for q in model.parameters())
    assert not found.requires_grad


def test_points_of_a_row_depend_on_no_other_row() -> None:
    x, _, y = batch()
    model, here = net(), room()
    for objective in (TRADES(steps=2), Fast(), NFGSM()):
        arguments = (model, x) if isinstance(objective, TRADES) else (model, x, y)
        whole = objective.points(*arguments, here)
        part = objective.points(*(a[[4, 1]] if isinstance(a, Tensor) else a for a in arguments), here)
        assert torch.allclose(whole[[4, 1]], part, atol=1e-12)
        other = objective.points(*arguments, room(seed=4))
        assert isinstance(objective, TRADES) or not torch.allclose(whole, other)


def test_trades_with_beta_zero_is_natural_training_bit_for_bit(tmp_path: Path) -> None:
    def trained(objective: Any, out: str) -> nn.Module:
        return run(tmp_path, objective, how=never, model=mixed_net(), threat="linf:0.1", out=out).model

    natural = trained(Natural(), "a")
    assert same(trained(TRADES(beta=0.0), "b"), natural)
    assert not same(trained(TRADES(beta=0.1, steps=1), "c"), natural)


def test_the_net_is_attacked_in_eval_mode_and_learns_in_training_mode() -> None:
    model = mixed_net().double()
    x, _, y = batch(8)
    for objective in (TRADES(steps=2), VAT(), Fast(), NFGSM()):
        before = model[1].num_batches_tracked.item()
        torch.manual_seed(0)
        objective.loss(model, x, y, Context(never, 0.1, 0.0, room()))
        looks = 2 if isinstance(objective, TRADES | VAT) else 1
        assert model[1].num_batches_tracked.item() - before == looks
        assert all(m.training for m in model.modules())


# ---- MART ---------------------------------------------------------------------------------------------------------


def mart_by_hand(beta: float, frozen: Weights | None = None) -> Callable[[Weights], float]:
    """The formula, row by row; ``frozen``: how unsure the net is, taken as given."""
    x, near, y = (t.numpy() for t in batch())

    def f(w: Weights) -> float:
        total = 0.0
        for k, label in enumerate(y):
            p, q = probabilities(w, x[k : k + 1])[0], probabilities(w, near[k : k + 1])[0]
            unsure = 1 - probabilities(frozen or w, x[k : k + 1])[0][label]
            rival = max(q[c] for c in range(CLASSES) if c != label)
            kl = sum(p[c] * np.log(p[c] / q[c]) for c in range(CLASSES))
            total += -np.log(q[label]) - np.log(1 - rival) + beta * kl * unsure
        return total / len(y)

    return f


@pytest.mark.parametrize("beta", [0.0, 5.0])
def test_mart_is_the_papers_formula(beta: float) -> None:
    assert agrees(MART(PGD(), beta), fixed(batch()[1]), mart_by_hand(beta))


def test_mart_differentiates_the_weight_of_a_row_too() -> None:
    assert not agrees(MART(PGD(), 5.0), fixed(batch()[1]), mart_by_hand(5.0, frozen=weights(net())))


def test_mart_is_finite_on_confident_nets() -> None:
    model = nn.Linear(2, 3)
    model.weight.data.copy_(torch.tensor([[400.0, 0.0], [0.0, 400.0], [0.0, 0.0]]))
    x, y = torch.eye(2), torch.tensor([0, 1])  # right at the inputs, wrong at the points
    loss = MART(PGD(), 6.0).loss(model, x, y, Context(lambda attack, x, y: x.flip(0), 0.1, 0.0))
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(model.weight.grad.isfinite().all())


# ---- one step -----------------------------------------------------------------------------------------------------


def test_fast_is_one_step_from_a_random_start_back_into_the_region() -> None:
    x, _, y = batch()
    model, here = net(), room("linf:0.1")
    start = here.start(x).numpy()
    clean = x.numpy()
    g = input_gradients(weights(model), start, y.numpy())
    expected = np.clip(np.clip(start + 1.25 * 0.1 * np.sign(g), clean - 0.1, clean + 0.1), 0, 1)
    points = Fast().points(model, x, y, here)
    assert np.allclose(points.numpy(), expected, atol=1e-12)
    loss = Fast().loss(model, x, y, Context(never, 0.1, 0.0, here))
    right = probabilities(weights(model), expected)[np.arange(len(y)), y]
    assert loss.item() == pytest.approx(-np.log(right).mean(), rel=1e-9)
    assert agrees(Fast(), Context(never, 0.1, 0.0, here, lambda make: points), lambda w: float(
        -np.log(probabilities(w, expected)[np.arange(len(y)), y]).mean()
    ))  # fmt: skip


def test_nfgsm_leaves_the_region_but_not_the_box() -> None:
    x, _, y = batch(40)
    model, here = net(), room("linf:0.1")
    start = here.start(x, 2.0).numpy()
    assert 0.15 < np.abs(start - x.numpy()).max() <= 0.2 + 1e-9
    g = input_gradients(weights(model), start, y.numpy())
    points = NFGSM().points(model, x, y, here)
    assert np.allclose(points.numpy(), np.clip(start + 0.1 * np.sign(g), 0, 1), atol=1e-12)
    size = (points - x).abs().amax(1)
    assert 0.2 < float(size.max()) <= 0.3 + 1e-9
    assert 0 <= float(points.min()) < 1e-9
    assert 1 - 1e-9 < float(points.max()) <= 1


def test_one_step_finds_its_way_on_a_confident_net() -> None:
    model = nn.Linear(1, 2)
    model.weight.data.copy_(torch.tensor([[200.0], [-200.0]]))
    x, y = torch.tensor([[0.5]]), torch.tensor([0])
    assert float(Fast().points(model, x, y, room())) == pytest.approx(0.4)  # the cross-entropy has no slope here


# ---- GradAlign ----------------------------------------------------------------------------------------------------


def aligned_by_hand(
    weight: float, near: Array, here: Weights | None, there: Weights | None
) -> Callable[[Weights], float]:
    """The formula, with either gradient taken at given weights."""
    x, _, y = (t.numpy() for t in batch())

    def f(w: Weights) -> float:
        a, b = input_gradients(here or w, x, y), input_gradients(there or w, near, y)
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        right = probabilities(w, x)[np.arange(len(y)), y]
        return float(-np.log(right).mean() + weight * (1 - cosine).mean())

    return f


def test_gradalign_differentiates_the_gradient_at_the_random_point_alone() -> None:
    x, _, _ = batch()
    given, context = weights(net()), Context(never, 0.1, 0.0, room("linf:0.4"))
    near = room("linf:0.4").start(x, draw=1).numpy()
    assert not np.allclose(near, room("linf:0.4").start(x).numpy())  # an objective inside starts elsewhere
    objective = GradAlign(Natural(), 0.7)
    assert agrees(objective, context, aligned_by_hand(0.7, near, given, None))
    assert not agrees(objective, context, aligned_by_hand(0.7, near, None, given))
    assert not agrees(objective, context, aligned_by_hand(0.7, near, None, None))


def test_gradalign_of_weight_zero_is_the_objective_alone() -> None:
    x, _, y = batch()
    bare, wrapped = (o.loss(net(), x, y, Context(never, 0.1, 0.0)) for o in (Natural(), GradAlign(Natural(), 0.0)))
    assert torch.equal(bare, wrapped)


def test_gradalign_bears_rows_without_a_gradient() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.ReLU(), nn.Linear(4, CLASSES)).double()
    model[0].bias.data.fill_(-100.0)  # no unit is active anywhere
    x, _, y = batch()
    context = Context(never, 0.1, 0.0, room())
    loss = GradAlign(Natural(), 1.0).loss(model, x, y, context)
    loss.backward()
    assert torch.allclose(loss, Natural().loss(model, x, y))
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TRADES(beta=-1), r"beta of TRADES.*at least 0; got -1"),
        (lambda: TRADES(steps=0), "steps of TRADES must be a whole number"),
        (lambda: TRADES(step_size=0.0), "step_size of TRADES must be a number above 0"),
        (lambda: TRADES(noise=0.0), "noise of TRADES"),
        (lambda: MART(PGD(), beta=float("nan")), "beta of MART"),
        (lambda: MART(PGD(), beta=-0.1), "beta of MART"),
        (lambda: Fast(length=0), "length of Fast"),
        (lambda: NFGSM(noise=-1), "noise of NFGSM"),
        (lambda: NFGSM(length=0), "length of NFGSM"),
        (lambda: Free(replays=0), "replays of Free"),
        (lambda: Free(length=-1), "length of Free"),
        (lambda: GradAlign(Natural(), -1), "weight of GradAlign"),
        (lambda: GradAlign(AWP(Natural())), "Put GradAlign inside it"),
        (lambda: GradAlign(3), "GradAlign wraps an objective; got 3"),
        (lambda: AWP(Natural(), gamma=-0.01), "gamma of AWP"),
        (lambda: AWP(Free()), "AWP adds to a loss, but Free is more"),
        (lambda: AWP(Natural), "AWP wraps an objective; got <class"),
    ],
)
def test_bad_settings_are_refused_in_words(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make()


def test_objectives_that_make_points_need_a_threat_they_serve(tmp_path: Path) -> None:
    for objective in (TRADES(), VAT(), Fast(), NFGSM(), Free(), GradAlign(Natural()), AWP(TRADES())):
        with pytest.raises(UsageError, match="finite radius"):
            run(tmp_path, objective)
        with pytest.raises(UsageError, match="needs a threat"):
            Context(never, 0.1, 0.0).around(objective)
    for objective in (Fast(), NFGSM(), VAT(), Free(), GradAlign(Natural()), AWP(Fast())):
        with pytest.raises(UsageError, match=r"does not serve the threat l0:2\. It serves: linf"):
            run(tmp_path, objective, threat="l0:2")


def test_a_net_says_what_it_was_trained_against(tmp_path: Path) -> None:
    for k, (objective, said) in enumerate([
        (TRADES(steps=1), repr(TRADES(steps=1))), (AWP(Saddle(FGSM())), repr(FGSM())),
        (GradAlign(Fast()), repr(GradAlign(Fast()))), (AWP(Natural()), None),
    ]):  # fmt: skip
        model = run(tmp_path, objective, threat="linf:0.1", epochs=1, batch=80, out=str(k)).model
        assert getattr(model, "trained_against", None) == said


def test_nets_are_watched_where_the_objective_makes_its_points_by_itself(tmp_path: Path) -> None:
    from training_problem import blobs, recipe

    from mohs.evaluation.training import train

    for k, (objective, watched) in enumerate([(Fast(), True), (AWP(Natural()), False)]):
        plan = recipe(objective, threat="linf:0.1", epochs=1, batch=80)
        row = train(plan, out=tmp_path / str(k), data=blobs(), device="cpu").curve[-1]
        assert ("many_steps" in row) == watched

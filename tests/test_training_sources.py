"""Trainings whose points come from other nets (ensemble, cascade), and the unified embedding, beside their formulas."""

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
    logits,
    net,
    probabilities,
    room,
    weights,
)
from training_problem import CLASSES, FEATURES, blobs, mixed_net, never, perturb, run, same

from mohs.attacks import BIM, FGSM, PGD, REGISTRY
from mohs.defenses.training import (
    AWP,
    MART,
    TRADES,
    Cascade,
    Context,
    Ensemble,
    FineTune,
    Free,
    GradAlign,
    Mixture,
    Natural,
    Pretrained,
    Saddle,
    UnifiedEmbedding,
)
from mohs.defenses.training.files import recipe_from_table
from mohs.errors import RecordError, UsageError

EPS = 0.1


def attacking(model: nn.Module, seed: int = 3, seen: list[Any] | None = None) -> Context:
    """A context that really attacks; ``seen`` gathers which net was attacked by what."""

    def run_attack(
        attack: Any, x: Tensor, y: Tensor, *, of: nn.Module | None = None, radii: Tensor | None = None
    ) -> Tensor:
        if seen is not None:
            seen.append((of, attack, y, radii))
        radii = x.new_full((len(x),), EPS) if radii is None else radii
        return perturb(attack, of or model, x, y, f"linf:{EPS}", eps=radii, seed=0, batch=8).detach()

    return Context(run_attack, EPS, 0.0, room(f"linf:{EPS}", seed))


def fgsm_by_hand(w: Weights, x: Array, labels: Array, eps: Array | float = EPS) -> Array:
    return np.clip(x + eps * np.sign(input_gradients(w, x, labels)), 0, 1)


def cross_entropy(w: Weights, x: Array, y: Array) -> float:
    return float(-np.log(probabilities(w, x)[np.arange(len(y)), y]).mean())


# ---- ensemble -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_ensemble_is_half_clean_and_half_fgsm_on_the_drawn_net(seed: int, own: bool) -> None:
    nets = [net(21), net(22), net()]  # the last has the weights of the one in training
    x, _, y = (t.numpy() for t in batch())
    drawn = nets[room(seed=seed).pick(3)]
    labels = logits(weights(drawn), x).argmax(1) if own else y
    points = fgsm_by_hand(weights(drawn), x, labels)
    others = [fgsm_by_hand(weights(n), x, labels) for n in nets if n is not drawn]
    assert all(np.abs(points - p).max() > 0.1 for p in others)  # the nets can be told apart

    def f(w: Weights) -> float:
        return (cross_entropy(w, x, y) + cross_entropy(w, points, y)) / 2

    def context(model: nn.Module) -> Context:
        return attacking(model, seed)

    objective = Ensemble(Mixture(FGSM()), (nets[0], nets[1]), own_labels=own)
    model = net()
    assert agrees(objective, context(model), f)


def test_the_drawn_nets_are_equally_likely_and_depend_on_the_step_alone() -> None:
    draws = [room(seed=seed).pick(3) for seed in range(900)]
    assert draws == [room("l2:1", seed).pick(3) for seed in range(900)]
    for k in range(3):
        assert abs(draws.count(k) - 300) < 4 * (900 * 2 / 9) ** 0.5  # four standard deviations


def test_own_labels_are_those_of_the_net_that_is_attacked() -> None:
    x, _, y = batch(40)
    model, source = net(), net(21)
    for own in (True, False):
        seen: list[Any] = []
        for seed in range(8):
            Ensemble(Saddle(FGSM()), (source,), own).loss(model, x, y, attacking(model, seed, seen))
        attacked = {of is model for of, *_ in seen}
        assert attacked == {True, False}
        for of, _, labels, _ in seen:
            assert torch.equal(labels, of(x).argmax(1) if own else y)
    assert not torch.equal(source(x).argmax(1), model(x).argmax(1))


def test_every_net_is_attacked_in_eval_mode_and_sources_stay_as_they_are(tmp_path: Path) -> None:
    sources = tuple(Pretrained(n) for n in (mixed_net().train(), nn.Linear(FEATURES, CLASSES)))
    before = [s.hash for s in sources]
    seen = []

    def spying(attack: Any, model: nn.Module, *rest: Any, **more: Any) -> Tensor:
        seen.append((model, any(m.training for m in model.modules())))
        return perturb(attack, model, *rest, **more)

    model = mixed_net()
    saw: list[int] = []  # rows in training mode
    model[0].register_forward_hook(lambda m, given, out: saw.append(len(out)) if m.training else None)
    objective = Ensemble(Mixture(FGSM()), sources)
    run(tmp_path, objective, how=spying, model=model, threat="linf:0.1", epochs=6)
    assert {id(m) for m, _ in seen} == {id(model), id(sources[0].module), id(sources[1].module)}
    assert not any(training for _, training in seen)
    assert saw == [16] * 60  # two looks in each of 30 steps, and none to ask for labels
    assert [Pretrained(s.module).hash for s in sources] == before
    assert all(p.grad is None for s in sources for p in s.module.parameters())


def test_both_looks_of_awp_use_the_same_net_and_points(tmp_path: Path) -> None:
    attacked: list[nn.Module] = []

    def counting(attack: Any, model: nn.Module, *rest: Any, **more: Any) -> Tensor:
        attacked.append(model)
        return perturb(attack, model, *rest, **more)

    objective = AWP(Ensemble(Saddle(FGSM()), (nn.Linear(FEATURES, CLASSES),)), 0.3)
    run(tmp_path, objective, how=counting, threat="linf:0.1", epochs=2)
    assert len(attacked) == 10  # once in each step
    assert len(set(map(id, attacked))) == 2


# ---- unified embedding --------------------------------------------------------------------------------------------


def embedding_by_hand(
    weight: float, similarity: float, frozen: Weights | None = None, points: Array | None = None
) -> Callable[[Weights], float]:
    """The formula row by row; ``frozen``: weights of the clean embedding in the last term."""
    x, near, y = (t.numpy() for t in batch())
    near = near if points is None else points

    def f(w: Weights) -> float:
        total = 0.0
        for k in range(len(y)):
            here, there = logits(frozen or w, x[k : k + 1])[0], logits(w, near[k : k + 1])[0]
            p, q = probabilities(w, x[k : k + 1])[0], probabilities(w, near[k : k + 1])[0]
            total += (-np.log(p[y[k]]) - weight * np.log(q[y[k]])) / (1 + weight)
            total += similarity * sum((a - b) ** 2 for a, b in zip(here, there, strict=True)) / 2
        return total / len(y)

    return f


@pytest.mark.parametrize(("weight", "similarity"), [(0.3, 0.0064), (1.0, 0.5), (0.0, 0.2), (0.4, 0.0)])
def test_the_unified_embedding_is_its_formula(weight: float, similarity: float) -> None:
    context = fixed(batch()[1])
    both = UnifiedEmbedding(FGSM(), weight, similarity)
    assert agrees(both, context, embedding_by_hand(weight, similarity))
    pivot = UnifiedEmbedding(FGSM(), weight, similarity, pivot=True)
    still = embedding_by_hand(weight, similarity, weights(net()))
    assert agrees(pivot, context, still)
    if similarity > 0.1:  # the two can be told apart
        assert not agrees(both, context, still)
        assert not agrees(pivot, context, embedding_by_hand(weight, similarity))


def test_its_radii_are_the_papers_and_belong_to_the_rows() -> None:
    x, _, y = batch(400)
    model, seen = net(), []
    UnifiedEmbedding(FGSM()).loss(model, x, y, attacking(model, 3, seen))
    radii = seen[0][3]
    assert float(radii.min()) > 0
    assert float(radii.max()) == pytest.approx(EPS)
    # a normal variable lies beyond two of its standard deviations in 4.55% of the cases, and below a half of one in 38.3%
    for share, expected in ((radii >= EPS * (1 - 1e-9), 0.0455), (radii < EPS / 4, 0.3829)):
        assert abs(float(share.double().mean()) - expected) < 4 * (expected * (1 - expected) / 400) ** 0.5
    assert torch.equal(room(f"linf:{EPS}").varied(x[[5, 2]]), radii[[5, 2]])
    assert not torch.allclose(room(f"linf:{EPS}", 4).varied(x), radii)
    UnifiedEmbedding(FGSM(), varied=False).loss(model, x, y, attacking(model, 3, seen))
    assert seen[1][3] is None


def test_clean_inputs_and_points_pass_the_net_together() -> None:
    model = mixed_net().double()
    x, near, y = batch(8)
    before = model[1].num_batches_tracked.item()
    UnifiedEmbedding(FGSM()).loss(model, x, y, fixed(near))
    assert model[1].num_batches_tracked.item() == before + 1
    mean = model[0](torch.cat([x, near])).mean(0)
    assert torch.allclose(model[1].running_mean, 0.1 * mean)


def test_the_radii_of_the_rows_reach_the_attack(tmp_path: Path) -> None:
    given: list[Tensor] = []

    def noting(*args: Any, eps: Tensor, **rest: Any) -> Tensor:
        given.append(eps)
        return perturb(*args, eps=eps, **rest)

    for varied in (True, False):
        run(tmp_path, UnifiedEmbedding(FGSM(), varied=varied), how=noting, threat="linf:0.1", epochs=1, out=str(varied))
    drawn, same_for_all = torch.cat(given[:5]), torch.cat(given[5:])
    assert len(set(drawn.tolist())) > 60
    assert same_for_all.tolist() == pytest.approx([0.1] * 80)


# ---- cascade ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_cascade_takes_some_points_from_the_defended_net(share: float) -> None:
    defended = net(31)
    x, _, y = (t.numpy() for t in batch())
    here = room(f"linf:{EPS}")
    radii = here.varied(batch()[0]).numpy()[:, None]
    theirs = (here.uniform(batch()[0]) < share).numpy()
    assert theirs.all() if share == 1 else 0 < theirs.sum() < len(theirs)
    w, points = weights(defended), x.copy()
    for _ in range(4):  # BIM on the defended net, in steps of a quarter of the row's radius
        moved = points + radii / 4 * np.sign(input_gradients(w, points, y))
        points = np.clip(np.clip(moved, x - radii, x + radii), 0, 1)
    points = np.where(theirs[:, None], points, fgsm_by_hand(weights(net()), x, y, radii))
    objective = Cascade(UnifiedEmbedding(FGSM(), 0.3, 0.2), BIM(steps=4), defended, share)
    assert agrees(objective, attacking(net()), embedding_by_hand(0.3, 0.2, points=points))


def test_a_rows_net_depends_on_no_other_row_and_changes_from_step_to_step() -> None:
    x, _, _ = batch(300)
    first = room(seed=1).uniform(x)
    assert torch.equal(first[[7, 250]], room(seed=1).uniform(x[[7, 250]]))
    assert abs(float((first < 0.5).double().mean()) - 0.5) < 4 * 0.5 / 300**0.5
    assert abs(float(((first < 0.5) == (room(seed=2).uniform(x) < 0.5)).double().mean()) - 0.5) < 0.12


def test_cascade_and_ensemble_can_be_combined() -> None:
    x, _, y = batch(30)
    model, source, defended = net(), Pretrained(net(21)), Pretrained(net(31))
    inner = UnifiedEmbedding(FGSM())
    for objective in (
        Ensemble(Cascade(inner, BIM(steps=2), defended), (source,), own_labels=False),
        Cascade(Ensemble(inner, (source,), own_labels=False), BIM(steps=2), defended),
    ):
        seen: list[Any] = []
        for seed in range(8):
            objective.loss(model, x, y, attacking(model, seed, seen))
        nets = {id(of): attack.attack for of, attack, *_ in seen}
        assert nets == {id(model): FGSM(), id(source.module): FGSM(), id(defended.module): BIM(steps=2)}
        assert objective.attack is not None


# ---- in the loop --------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def objectives(other: nn.Module) -> list[Any]:
    return [
        Ensemble(Mixture(FGSM()), (other, nn.Linear(FEATURES, CLASSES).requires_grad_(False))),
        Cascade(UnifiedEmbedding(FGSM()), BIM(steps=2), other),
    ]


@pytest.mark.parametrize("which", [0, 1])
def test_a_resumed_training_ends_in_the_same_bytes_and_refuses_other_nets(tmp_path: Path, which: int) -> None:
    def go(out: str, objective: Any, last: int = 99) -> nn.Module:
        told: list[Any] = []

        def die(p: Any) -> None:
            told.append(p)
            if len(told) == last:
                raise Killed

        return run(tmp_path, objective, model=mixed_net(), threat="linf:0.1", progress=die, out=out).model

    other = nn.Linear(FEATURES, CLASSES)
    objective = objectives(other)[which]
    with pytest.raises(Killed):
        go("killed", objective, last=7)
    other.weight.data.add_(1e-3)
    with pytest.raises(RecordError, match="another run"):
        go("killed", objectives(other)[which])
    assert same(go("killed", objective), go("whole", objective))


def test_nets_of_other_classes_are_refused_before_the_first_step(tmp_path: Path) -> None:
    wide = nn.Linear(FEATURES, CLASSES + 2)
    for objective in (
        Ensemble(Mixture(FGSM()), (nn.Linear(FEATURES, CLASSES), wide)),
        AWP(Cascade(UnifiedEmbedding(FGSM()), BIM(), wide)),
    ):
        with pytest.raises(UsageError, match=r"Pretrained\('Linear'.* knows 5 classes, the net in training 3"):
            run(tmp_path, objective, how=never, threat="linf:0.1")


SOURCE = nn.Linear(FEATURES, CLASSES)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Ensemble(Mixture(FGSM()), ()), "Ensemble has no sources"),
        (lambda: Ensemble(Mixture(FGSM()), []), "Ensemble has no sources"),
        (lambda: Ensemble(Mixture(FGSM()), (3,)), "source of Ensemble: 3 cannot be loaded"),
        (lambda: Ensemble(TRADES(), (SOURCE,)), "Ensemble runs the attack.*TRADES runs none"),
        (lambda: Ensemble(Natural(), (SOURCE,)), "Natural runs none in its steps"),
        (lambda: Ensemble(FineTune(FGSM()), (SOURCE,)), "FineTune runs none in its steps"),
        (lambda: Ensemble(Free(), (SOURCE,)), "Put Ensemble inside it"),
        (lambda: Ensemble(FGSM(), (SOURCE,)), "Ensemble wraps an objective; got FGSM"),
        (lambda: Cascade(AWP(Saddle(FGSM())), BIM(), SOURCE), "Put Cascade inside it"),
        (lambda: Cascade(Natural(), BIM(), SOURCE), "Cascade runs the attack"),
        (lambda: Cascade(Saddle(FGSM()), BIM(), SOURCE, share=0), "share of Cascade"),
        (lambda: Cascade(Saddle(FGSM()), BIM(), SOURCE, share=1.1), "share of Cascade"),
        (lambda: Cascade(Saddle(FGSM()), BIM(), "none"), "defended net of Cascade: 'none' cannot be loaded"),
        (lambda: UnifiedEmbedding(FGSM(), weight=-1), "weight of UnifiedEmbedding"),
        (lambda: UnifiedEmbedding(FGSM(), similarity=float("nan")), "similarity of UnifiedEmbedding"),
    ],
)
def test_bad_settings_are_refused_in_words(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make()


def test_they_need_a_threat_and_the_regions_of_what_they_wrap(tmp_path: Path) -> None:
    for objective in objectives(SOURCE):
        with pytest.raises(UsageError, match="finite radius"):
            run(tmp_path, objective)
    with pytest.raises(UsageError, match="GradAlign does not serve the threat l0:2"):
        run(tmp_path, Ensemble(GradAlign(Saddle(PGD())), (SOURCE,)), threat="l0:2")
    run(tmp_path, Ensemble(MART(PGD(steps=1)), SOURCE), threat="l2:0.2", epochs=1, data=blobs(40))


def test_recipes_know_them() -> None:
    rest = {"name": "t", "data": "d", "net": "small_cnn", "epochs": 1, "threat": "linf:0.1"}

    def read(objective: Any) -> Any:
        return recipe_from_table({**rest, "objective": objective}, REGISTRY, "here").objective

    one, two = "bundled:fashion-natural", "bundled:fashion-pgd"
    mixture = {"name": "mixture", "attack": "FGSM"}
    assert read({"name": "ensemble", "sources": [one, two], "objective": mixture}) == Ensemble(
        Mixture(FGSM()), (one, two)
    )
    embedding = {"name": "unified_embedding", "attack": "fgsm", "weight": 0.5, "pivot": True}
    assert read(embedding) == UnifiedEmbedding(FGSM(), 0.5, pivot=True)
    table = {"name": "cascade", "attack": "BIM", "steps": 5, "defended": two, "objective": embedding}
    assert read(table) == Cascade(UnifiedEmbedding(FGSM(), 0.5, pivot=True), BIM(steps=5), two)
    for wrong, said in (
        ({"name": "ensemble", "objective": mixture}, "Ensemble also needs sources"),
        ({"name": "ensemble", "sources": [], "objective": mixture}, "Ensemble has no sources"),
        ({"name": "ensemble", "sources": one, "objective": mixture}, "sources was 'bundled:fashion-natural'; allowed"),
        (
            {"name": "ensemble", "sources": ["lenet"], "objective": mixture},
            "source of Ensemble: 'lenet' cannot be loaded",
        ),
        ({**table, "defended": "no.safetensors"}, "does not exist"),
    ):
        with pytest.raises(UsageError, match=said):
            read(wrong)

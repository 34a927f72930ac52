"""Defensive distillation beside its formula, and the fixed nets that trainings use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from training_formulas import Weights, agrees, batch, fixed, net, probabilities, weights
from training_problem import CLASSES, FEATURES, blobs, mixed_net, never, recipe, run, same

from mohs.attacks import FGSM, PGD, REGISTRY
from mohs.defenses.training import AWP, SGD, Adam, Distillation, Mixture, Natural, Pretrained, Recipe
from mohs.defenses.training.files import recipe_from_table
from mohs.defenses.training.objective import pretrained_in
from mohs.errors import ModelError, RecordError, UsageError
from mohs.evaluation.training import distil
from mohs.models import save_weights, weights_hash


def by_hand(temperature: float, given: Weights | None = None) -> Callable[[Weights], float]:
    """Cross-entropy at a temperature: with the labels, or with the answers of a net of given weights."""
    x, _, y = (t.numpy() for t in batch())

    def f(w: Weights) -> float:
        own = np.log(probabilities(w, x, temperature))
        wanted = np.eye(CLASSES)[y] if given is None else probabilities(given, x, temperature)
        return float(-(wanted * own).sum(1).mean())

    return f


@pytest.mark.parametrize("temperature", [0.3, 1, 20.0])
def test_distillation_and_its_teachers_training_are_their_formulas(temperature: float) -> None:
    teacher = net(7)
    f = by_hand(temperature, weights(teacher))
    assert agrees(Distillation(teacher, temperature), fixed(batch()[0]), f)
    assert agrees(Natural(temperature), fixed(batch()[0]), by_hand(temperature))
    # another temperature on either side is another objective: both are divided, and there is no factor T * T
    for other in (1.5 * temperature, 4 * temperature):
        assert abs(by_hand(other, weights(teacher))(weights(net())) - f(weights(net()))) > 1e-4


def test_labels_play_no_part_in_distillation() -> None:
    x, _, y = batch()
    a, b = (Distillation(net(7), 5.0).loss(net(), x, labels) for labels in (y, (y + 1) % CLASSES))
    assert torch.equal(a, b)


def test_at_temperature_one_it_is_training_on_soft_labels(tmp_path: Path) -> None:
    teacher = mixed_net().eval()
    x, _ = blobs()
    with torch.no_grad():
        stored = {row.numpy().tobytes(): soft for row, soft in zip(x, teacher(x).softmax(1), strict=True)}

    class Soft:
        attack: ClassVar[None] = None

        def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Any) -> Tensor:
            return F.cross_entropy(model(x), torch.stack([stored[row.numpy().tobytes()] for row in x]))

    distilled = run(tmp_path, Distillation(teacher, 1.0), how=never, model=mixed_net(), out="a").model
    soft = run(tmp_path, Soft(), how=never, model=mixed_net(), out="b").model
    for p, q in zip(distilled.parameters(), soft.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)
    assert same(run(tmp_path, Natural(1), out="c").model, run(tmp_path, Natural(), out="d").model)
    assert not same(run(tmp_path, Natural(2.0), out="e").model, run(tmp_path, Natural(), out="d").model)


@given(st.floats(0.05, 200), st.integers(0, 20))
@settings(max_examples=30, deadline=None)
def test_no_net_has_a_smaller_loss_than_the_teacher_itself(temperature: float, seed: int) -> None:
    x, _, y = batch()
    objective = Distillation(net(7), temperature)
    assert objective.loss(net(7), x, y) <= objective.loss(net(seed), x, y) + 1e-12


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, float("nan"), float("inf"), True, "20", None])
def test_only_temperatures_above_zero_are_taken(temperature: Any) -> None:
    for make in (lambda: Distillation(net(), temperature), lambda: Natural(temperature)):
        with pytest.raises(UsageError, match=r"temperature of .*divides the logits.*above 0; got"):
            make()


# ---- the fixed net ------------------------------------------------------------------------------------------------


def test_a_fixed_net_is_a_copy_in_eval_mode_and_leaves_the_given_one_alone() -> None:
    given = mixed_net().train()
    teacher = Pretrained(given)
    before = weights_hash(given)
    x, y = blobs(20)
    first = Distillation(teacher, 3.0).loss(net().float(), x, y)
    assert torch.equal(Distillation(teacher, 3.0).loss(net().float(), x, y), first)  # no dropout, no batch statistics
    first.backward()
    assert all(m.training for m in given.modules())
    assert not any(m.training for m in teacher.module.modules())
    assert weights_hash(given) == before == weights_hash(teacher.module)
    assert all(p.grad is None for p in [*given.parameters(), *teacher.module.parameters()])
    assert all(p.requires_grad for p in given.parameters())
    given[0].weight.data.zero_()  # nothing that happens to it later matters
    assert torch.equal(Distillation(teacher, 3.0).loss(net().float(), x, y), first)


def test_a_fixed_net_is_known_by_its_weights_and_its_code(tmp_path: Path) -> None:
    a, b = net(1), net(2)
    assert Pretrained(a) == Pretrained(net(1)) != Pretrained(b)
    assert len({Pretrained(a), Pretrained(net(1)), Pretrained(b)}) == 2
    assert repr(Distillation(a, 2.0)) == repr(Distillation(net(1), 2.0)) != repr(Distillation(b, 2.0))
    bent = nn.Sequential(a[0], nn.ReLU(), a[2])
    assert weights_hash(bent) == weights_hash(a)
    assert Pretrained(bent) != Pretrained(a)
    assert recipe(Distillation(a, 2.0)).identity != recipe(Distillation(b, 2.0)).identity
    assert pretrained_in(AWP(Distillation(a, 2.0))) == [Pretrained(a)]
    save_weights(recipe().build_net(), tmp_path / "net.safetensors", {"arch": "linear"})
    with pytest.raises(ModelError, match="do not fit"):  # the stored architecture is the one of 784 inputs
        Pretrained(str(tmp_path / "net.safetensors"))
    assert Pretrained("bundled:fashion-pgd") != Pretrained("bundled:fashion-natural")


@pytest.mark.parametrize("given", ["small_cnn", "os:getcwd", "net.pt", "net.onnx", "http://host/v2/models/a/infer", 3])
def test_other_references_are_refused(given: Any) -> None:
    with pytest.raises(
        UsageError, match=r"teacher of Distillation: .* cannot be loaded.*Allowed: 'bundled:NAME', 'FILE"
    ):
        Distillation(given, 2.0)


def test_nets_that_cannot_be_used_are_refused_before_the_first_step(tmp_path: Path) -> None:
    for teacher, error, said in (
        (nn.Linear(FEATURES, CLASSES + 1), UsageError, "knows 4 classes, the net in training 3"),
        (nn.Linear(FEATURES, 1), UsageError, "knows 2 classes"),
        (nn.Linear(FEATURES + 1, CLASSES), ModelError, r"Pretrained\('Linear'.*raised RuntimeError"),
    ):
        with pytest.raises(error, match=said):
            run(tmp_path, AWP(Distillation(teacher, 2.0)))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ModelError, match="teacher of Distillation: no bundled model 'none'"):
        Distillation("bundled:none", 2.0)
    with pytest.raises(ModelError, match="does not exist"):
        Distillation("none.safetensors", 2.0)

    class Uncopied(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("no copies")

    with pytest.raises(ModelError, match="Uncopied cannot be copied"):
        Distillation(Uncopied(2, 2), 2.0)


class Killed(Exception):
    pass


def test_a_resumed_distillation_ends_in_the_same_bytes_and_refuses_another_teacher(tmp_path: Path) -> None:
    def go(out: str, teacher: nn.Module, last: int = 99) -> Any:
        told: list[Any] = []

        def die(p: Any) -> None:
            told.append(p)
            if len(told) == last:
                raise Killed

        return run(tmp_path, Distillation(teacher, 20.0), model=mixed_net(), progress=die, out=out)

    teacher = nn.Linear(FEATURES, CLASSES)
    with pytest.raises(Killed):
        go("killed", teacher, last=7)
    with pytest.raises(RecordError, match="another run"):
        go("killed", nn.Linear(FEATURES, CLASSES))
    assert same(go("killed", teacher).model, go("whole", teacher).model)


# ---- both trainings -----------------------------------------------------------------------------------------------


def plan(temperature: float, **changes: Any) -> Recipe:
    return recipe(Natural(temperature), epochs=6, optimiser=Adam(lr=0.2), **changes)


def test_distil_is_two_trainings_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    both = distil(plan(10.0), out=tmp_path / "both", data=blobs(), device="cpu")
    teacher = run(tmp_path, Natural(10.0), name="tiny-teacher", epochs=6, optimiser=Adam(lr=0.2), out="t").model
    assert same(both.teacher.model, teacher)
    student = run(tmp_path, Distillation(teacher, 10.0), epochs=6, optimiser=Adam(lr=0.2), out="s").model
    assert same(both.student.model, student)
    assert both.student.weights == tmp_path / "both" / "student" / "weights.safetensors"
    told: list[Any] = []
    again = distil(plan(10.0), out=tmp_path / "both", data=blobs(), device="cpu", progress=told.append)
    assert not told
    assert same(again.student.model, student)
    for objective in (Distillation(teacher, 10.0), Mixture(FGSM())):
        with pytest.raises(UsageError, match=r"Give Natural\(temperature=20\)"):
            distil(recipe(objective, threat="linf:0.1"), out=tmp_path / "no", data=blobs())


def test_a_distilled_linear_net_is_the_undistilled_one_with_larger_logits(tmp_path: Path) -> None:
    def trained(temperature: float) -> nn.Module:
        zero = nn.Linear(FEATURES, CLASSES)
        for p in zero.parameters():
            p.data.zero_()
        # with v = w / T the loss at T is that at 1, and a step on w moves v by lr / T^2
        faster = SGD(lr=temperature**2 * 0.5, momentum=0.0)
        made = recipe(Natural(temperature), epochs=15, optimiser=faster)
        return distil(made, out=tmp_path / str(temperature), data=blobs(), model=zero, device="cpu").student.model

    x, y = blobs()
    bare, distilled = trained(1.0), trained(16.0)
    for p, q in zip(bare.parameters(), distilled.parameters(), strict=True):
        assert torch.allclose(16 * p, q, rtol=1e-4, atol=1e-4)
    assert float((distilled(x).argmax(1) == y).float().mean()) > 0.95
    # the answers are the same, the cross-entropy has almost no slope left
    left = [F.cross_entropy(made(x), made(x).argmax(1)).item() for made in (bare, distilled)]
    assert left[1] < left[0] / 100


def test_distil_trains_a_given_net_in_place(tmp_path: Path) -> None:
    given = mixed_net()
    before = weights_hash(given)
    both = distil(plan(5.0), out=tmp_path, data=blobs(), model=given, device="cpu")
    assert both.student.model is given
    assert both.teacher.model is not given
    assert before != weights_hash(given) != weights_hash(both.teacher.model)


def test_recipes_name_fixed_nets_by_reference(tmp_path: Path) -> None:
    rest = {"name": "t", "data": "d", "net": "small_cnn", "epochs": 1}

    def read(objective: Any, **more: Any) -> Recipe:
        return recipe_from_table({**rest, **more, "objective": objective}, REGISTRY, "here")

    bundled = "bundled:fashion-natural"
    read_one = read({"name": "distillation", "teacher": bundled, "temperature": 20})
    assert read_one.objective == Distillation(bundled, 20)
    assert "hash=" in repr(read_one)
    save_weights(Pretrained(bundled).module, tmp_path / "w.safetensors", {"arch": "small_cnn"})
    other = read({"name": "distillation", "teacher": str(tmp_path / "w.safetensors"), "temperature": 20.0})
    assert other.objective == Distillation(bundled, 20.0)  # the same weights
    assert read({"name": "natural", "temperature": 20.0}).objective == Natural(20.0)
    assert read("natural", start=bundled).start == Pretrained(bundled)
    for wrong, said in (
        ({"name": "distillation", "teacher": bundled}, "Distillation also needs temperature"),
        ({"name": "distillation", "teacher": bundled, "temperature": 0}, "above 0; got 0"),
        ({"name": "distillation", "teacher": 3, "temperature": 2}, "teacher was 3; allowed"),
        ({"name": "distillation", "teacher": "os:getcwd", "temperature": 2}, "Allowed: 'bundled:NAME'"),
    ):
        with pytest.raises(UsageError, match=said):
            read(wrong)
    with pytest.raises(UsageError, match="start of recipe 't': 'small_cnn' cannot be loaded"):
        read("natural", start="small_cnn")


# ---- a training that goes on --------------------------------------------------------------------------------------


def test_a_recipe_may_start_from_a_trained_net(tmp_path: Path) -> None:
    first = run(tmp_path, out="a").model
    assert same(recipe(start=first).build_net(), first)
    assert recipe(start=first).identity != recipe().identity != recipe(start=recipe().build_net()).identity
    on = run(tmp_path, start=first, out="b").model
    assert same(on, run(tmp_path, model=Pretrained(first).module.requires_grad_(True), out="c").model)
    assert not same(on, first)
    with pytest.raises(ModelError, match=r"Recipe 'tiny' starts the net linear from Pretrained.*do not fit"):
        run(tmp_path, start=nn.Linear(FEATURES, CLASSES), out="d")
    with pytest.raises(UsageError, match="a model was given to start from as well"):
        run(tmp_path, start=first, model=mixed_net(), out="d")
    with pytest.raises(UsageError, match="no radius that could grow"):
        recipe(threat="l2:inf", warmup=1)
    assert recipe(Mixture(PGD()), threat="linf:0.1").start is None

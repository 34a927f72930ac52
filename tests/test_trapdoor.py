"""Trapdoors: the triggers, the planting, the signatures against a recomputation, the thresholds, and how they fall."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import mohs
from mohs.data import load
from mohs.defenses import BitDepth, Defended, Trapdoor, declared
from mohs.errors import DataError, ModelError, UsageError

EASY: dict[str, Any] = {"side": 5, "strength": 1.0, "epochs": 12, "lr": 0.005, "fpr": 0.2}
"""Triggers that are learnt within a second."""
Data = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture(scope="module")
def fashion() -> Data:
    data = load("bundled:fashion-mnist", n=1000)
    return mohs.models.load("bundled:fashion-natural"), data.x, data.y


@pytest.fixture(scope="module")
def planted(fashion: Data) -> Defended:
    net, x, y = fashion
    return Trapdoor(**EASY).fit(net, x[:600], y[:600])


def parts(guarded: Defended) -> tuple[nn.Module, Any]:
    return guarded.model["classifier"], guarded.model["detector"]


class TestTriggers:
    @given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.sampled_from([0.1, 1.0]), st.integers(0, 10**6))
    @settings(max_examples=30, deadline=None)
    def test_squares_of_clipped_noise(self, traps: int, squares: int, side: int, strength: float, seed: int) -> None:
        trapdoor = Trapdoor(traps=traps, squares=squares, side=side, strength=strength)
        masks, patterns = trapdoor._triggers(4, (2, 9, 7), torch.Generator().manual_seed(seed))
        assert (masks.shape, patterns.shape) == ((4, traps, 1, 9, 7), (4, traps, 2, 9, 7))
        inside = masks > 0
        assert masks.unique().tolist() == pytest.approx([0.0, strength] if not bool(inside.all()) else [strength])
        area = inside.flatten(2).sum(2)
        assert bool(((area >= side**2) & (area <= squares * side**2)).all())
        assert bool(((patterns >= 0) & (patterns <= 1)).all())
        assert not bool(patterns[~inside.expand_as(patterns)].any())

    def test_a_trigger_is_mixed_in_by_its_opacity(self, planted: Defended) -> None:
        _, state = parts(planted)
        x = torch.full((1, 1, 28, 28), 0.5)
        k, which = torch.tensor([3]), torch.tensor([0])
        faint = copy.deepcopy(state)
        faint.masks = 0.1 * state.masks
        found, whole = faint.triggered(x, k, which)[0, 0], state.triggered(x, k, which)[0, 0]
        inside = state.masks[3, 0, 0] > 0
        assert bool((whole[~inside] == 0.5).all())
        assert torch.equal(whole[inside], state.patterns[3, 0, 0][inside])
        assert torch.allclose(found, torch.where(inside, 0.45 + 0.1 * whole, 0.5))

    def test_one_for_each_class(self, planted: Defended) -> None:
        masks = parts(planted)[1].masks.flatten(1)
        assert len({tuple(row) for row in masks.tolist()}) == 10


class TestPlanting:
    def test_triggers_lead_to_their_class_and_clean_inputs_to_theirs(self, fashion: Data, planted: Defended) -> None:
        _, x, y = fashion
        net, state = parts(planted)
        for k in range(10):
            at = torch.full((400,), k)
            lured = net(state.triggered(x[600:], at, torch.zeros_like(at))).argmax(1) == k
            assert float(lured.double().mean()) > 0.8, k
        assert float((net(x[600:]).argmax(1) == y[600:]).double().mean()) > 0.7, "trained on 400 images"

    def test_the_model_itself_stays_as_it_is(self, fashion: Data) -> None:
        _, x, y = fashion
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 6, 5, stride=3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(384, 32),
            nn.ReLU(), nn.Linear(32, 10),
        ).eval()  # fmt: skip
        net[0].requires_grad_(False)
        before = {k: v.clone() for k, v in net.state_dict().items()}
        generator = torch.get_rng_state()
        guarded = Trapdoor(**EASY | {"epochs": 25, "fpr": 0.5}).fit(net, x[:600], y[:600])
        copied, _ = parts(guarded)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        assert not torch.equal(copied[1].running_mean, net[1].running_mean), "the copy is trained as nets are"
        assert not torch.equal(copied[0].weight, net[0].weight)
        for model in (net, copied):
            assert [p.requires_grad for p in model.parameters()] == [False] * 2 + [True] * 6
            assert all(p.grad is None for p in model.parameters())
            assert not any(m.training for m in model.modules())
        assert torch.equal(torch.get_rng_state(), generator)

    def test_what_was_not_learnt_is_refused(self, fashion: Data) -> None:
        net, x, y = fashion
        with pytest.raises(ModelError, match=r"After 1 epochs \d+% of the triggered inputs.*at least 90% must"):
            Trapdoor(epochs=1).fit(net, x[:300], y[:300])


class TestDetector:
    def test_signatures_and_similarity_by_definition(self, fashion: Data) -> None:
        net, x, y = fashion
        guarded = Trapdoor(traps=2, neurons=0.3, **EASY | {"epochs": 20}).fit(net, x[:600], y[:600], seed=1)
        classifier, state = parts(guarded)
        generator = torch.Generator().manual_seed(1)
        Trapdoor(traps=2, **EASY)._triggers(10, (1, 28, 28), generator)
        taught = torch.randperm(600, generator=generator)[200:]
        assert state.name == "5"
        assert int(state.neurons.sum()) == 30
        for k, which in ((0, 0), (4, 1)):
            others = x[taught][y[taught] != k]
            mask, pattern = state.masks[k, which], state.patterns[k, which]
            with torch.no_grad():
                seen = classifier[:6](mask * pattern + (1 - mask) * others)
            assert torch.allclose(state.signatures[k, which], seen.mean(0) * state.neurons, atol=1e-4)
        with torch.no_grad():
            seen = classifier[:6](x[600:650]) * state.neurons
            alike = F.cosine_similarity(seen[:, None, None], state.signatures[None], dim=3).amax(2)
            logits, scores = guarded.defense.score(classifier, state, x[600:650])
        assert torch.allclose(scores, alike - state.limits, atol=1e-5)
        assert float(state.threshold) == 0
        assert torch.equal(logits, classifier(x[600:650]))

    def test_each_answer_keeps_its_rate(self, fashion: Data, planted: Defended) -> None:
        _, x, _ = fashion
        classifier, _ = parts(planted)
        generator = torch.Generator().manual_seed(0)
        planted.defense._triggers(10, (1, 28, 28), generator)
        held = torch.randperm(600, generator=generator)[:200]
        answer = classifier(x[held]).argmax(1)
        refused = planted(x[held]).argmax(1) == 10
        for k in range(10):
            n = int((answer == k).sum())
            assert int(refused[answer == k].sum()) == n - -(-(n + 1) * 4 // 5), "of n those above the order statistic"
        fresh = planted(x[600:]).argmax(1) == 10
        assert 0.1 < float(fresh.double().mean()) < 0.3

    def test_attacks_fall_into_them_unless_they_look(self, fashion: Data, planted: Defended) -> None:
        _, x, y = fashion
        guarded, (classifier, state) = planted, parts(planted)
        k = torch.arange(400) % 10
        lured = guarded(state.triggered(x[600:], k, torch.zeros_like(k))).argmax(1) == 10
        assert float(lured.double().mean()) > 0.9
        blind = mohs.attack(
            mohs.attacks.PGD(steps=20), classifier, x[600:700], y[600:700], "linf:0.1", stop=mohs.Stop.BUDGET
        )
        caught = guarded(blind.x[blind.success]).argmax(1) == 10
        assert float(caught.double().mean()) > 0.5, "of clean inputs a fifth"
        attack = mohs.attacks.APGD(steps=20, objective=mohs.objectives.margin)
        seeing = mohs.attack(attack, guarded, x[600:660], y[600:660], "linf:0.1", reject=10)
        right = guarded(x[600:660]).argmax(1) == y[600:660]
        assert float((right & ~seeing.success).double().mean()) < 0.1

    def test_the_same_seed_the_same_detector_and_it_can_be_stored(self, fashion: Data, planted: Defended) -> None:
        net, x, y = fashion
        one = Trapdoor(**EASY).fit(net, x[:600], y[:600])
        assert torch.equal(one(x[:8]), planted(x[:8]))
        other = Trapdoor(**EASY).fit(net, x[:600], y[:600], seed=1)
        assert not torch.equal(other(x[:8]), planted(x[:8]))
        other.load_state_dict(planted.state_dict())
        assert torch.equal(other(x[:8]), planted(x[:8])), "weights, triggers and thresholds are all there"

    def test_behind_another_defense(self, fashion: Data, planted: Defended) -> None:
        _, x, _ = fashion
        both = BitDepth(4)(planted)
        assert declared(both).rejects
        assert declared(both).unit
        assert both(x[:3]).shape == (3, 11)


class TestRefusals:
    def test_data(self, fashion: Data) -> None:
        net, x, y = fashion
        with pytest.raises(ModelError, match="works on images"):
            Trapdoor().fit(net, x.flatten(1), y)
        with pytest.raises(ModelError, match=r"needs inputs in \[0, 1\]"):
            Trapdoor().fit(net, 255 * x, y)
        with pytest.raises(DataError, match="one label, int64"):
            Trapdoor().fit(net, x, y[:3])
        with pytest.raises(DataError, match="0 to 9"):
            Trapdoor().fit(net, x, y + 1)
        with pytest.raises(DataError, match="Squares of side 29"):
            Trapdoor(side=29).fit(net, x, y)
        with pytest.raises(DataError, match=r"for the answer \d and among the third.*at least 19 clean examples"):
            Trapdoor(**EASY | {"fpr": 0.05}).fit(net, x[:400], y[:400])

    def test_models(self, fashion: Data) -> None:
        _, x, y = fashion
        with pytest.raises(UsageError, match="one layer with weights alone: 1"):
            Trapdoor().fit(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval(), x, y)
        with pytest.raises(UsageError, match=r"training mode \(0: Dropout\)"):
            Trapdoor().fit(nn.Sequential(nn.Dropout(), nn.Flatten(), nn.Linear(784, 10)), x, y)

    @pytest.mark.parametrize(
        "bad",
        [
            {"traps": 0}, {"squares": 0}, {"side": 1.5}, {"strength": 0.0}, {"strength": 1.1}, {"share": 0.0}, {"share": 1.0},
            {"epochs": 0}, {"lr": 0.0}, {"neurons": 0.0}, {"neurons": 1.5}, {"fpr": 0.0}, {"layer": ("a",)},
        ],
        ids=str,
    )  # fmt: skip
    def test_settings(self, bad: dict[str, Any]) -> None:
        with pytest.raises(UsageError, match="Trapdoor"):
            Trapdoor(**bad)

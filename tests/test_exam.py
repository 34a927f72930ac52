"""The exam: what it plants is there, what it promises holds, weak attacks fail it and strong ones pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mohs
from mohs.attacks import APGD, FGSM, PGD, Square
from mohs.defenses import BitDepth, Honest
from mohs.errors import DataError, ModelError, ThreatError, UsageError
from mohs.evaluation import Plan, PlanStep
from mohs.evaluation._needle import Binarised, Hider, Untestable, at_radius, fit_head, last_linear
from mohs.evaluation.exam import Exam
from mohs.gradients import Past, Through

EPS = 0.2
THREATS = ["linf:0.2", "l2:0.6", "l1:2", "l1.5:1"]


def small(seed: int = 0, inputs: int = 24, features: int = 40) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, features), nn.Tanh(), nn.Linear(features, 3)
        )
    for layer in (net[0], net[2]):
        layer.weight.data *= 2
    return net.eval()


def answered(model: nn.Module, rows: int = 12, inputs: int = 24, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs with the model's own answers as labels."""
    x = torch.rand(rows, inputs, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits = model(x)
    return x, (logits.argmax(1) if logits.dim() == 2 and logits.shape[1] > 1 else (logits.flatten() > 0).long())


def hider(model: nn.Module, threat: str = "linf:0.2", **settings: Any) -> Hider:
    given: dict[str, Any] = {"inner": 300, "reach": 0.95, "looks": 50, "seed": 0, "batch": 64, **settings}
    return Hider(model, "4", mohs.Threat.parse(threat), **given)


def sized(change: Tensor, threat: str) -> np.ndarray:
    """Norm of each row, by numpy in float64."""
    name = threat.partition(":")[0][1:]
    return np.linalg.norm(change.double().flatten(1).numpy(), ord=np.inf if name == "inf" else float(name), axis=1)


# ---- what is planted is there ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", [None, 0.95])
@pytest.mark.parametrize("threat", THREATS)
def test_the_needle_is_there_and_no_inner_point_is(threat: str, reach: float | None) -> None:
    net, eps = small(), mohs.Threat.parse(threat).region.eps
    for x in answered(net, 2)[0].split(1):
        room = hider(net, threat, reach=reach).hide(x, keep=True)
        assert room.inner is not None
        assert torch.equal(room.inner[:1], x)
        assert (sized(room.inner - x, threat) <= 0.95 * eps * (1 + 1e-4)).all()
        size = float(sized(room.needle - x, threat)[0])
        assert size <= eps * (1 + 1e-5)
        assert reach is not None or size >= eps * (1 - 1e-4)
        for points in (room.inner, room.needle):
            assert ((points >= 0) & (points <= 1)).all()
        assert not room.model(room.inner).argmax(1).any()
        assert room.model(room.needle).argmax(1).tolist() == [1]


def test_the_linf_needle_is_a_corner() -> None:
    net, x = small(), torch.full((1, 24), 0.5)
    needle = hider(net, reach=None).hide(x).needle
    assert torch.allclose((needle - x).abs(), torch.full_like(x, EPS), atol=1e-6)


def test_the_head_reads_the_features_and_answers_in_the_range_of_the_model() -> None:
    net = small()
    x = answered(net, 1)[0]
    room = hider(net, reach=None).hide(x, keep=True)
    assert room.inner is not None
    points = torch.cat([room.inner, room.needle])
    with torch.no_grad():
        features, own, logits = net[:-1](points).double(), net(points), room.model(points)
    assert room.dimension == features.shape[1] == 40
    assert float(logits.max()) == pytest.approx(float(own.max()), abs=1e-3)
    assert float(logits.min()) == pytest.approx(float(own.min()), abs=1e-3)
    # linear in the features: least squares on them leaves nothing
    score = (logits[:, 1] - logits[:, 0]).double().unsqueeze(1)
    full = torch.cat([features, torch.ones(len(points), 1).double()], 1)
    assert float((full @ torch.linalg.lstsq(full, score).solution - score).abs().max()) < 1e-3


def test_the_threshold_lies_just_below_the_needle() -> None:
    net = small()
    room = hider(net, reach=None).hide(answered(net, 1)[0], keep=True)
    assert room.inner is not None
    with torch.no_grad():
        inner, needle = (float((z[:, 1] - z[:, 0]).max()) for z in (room.model(room.inner), room.model(room.needle)))
    assert needle / (needle - inner) == pytest.approx(0.001, rel=0.05)


def test_reach_leaves_so_much_of_the_way_to_the_best_known_score() -> None:
    net = small()
    room = hider(net, reach=0.95).hide(answered(net, 1)[0], keep=True)
    assert room.inner is not None
    with torch.no_grad():
        inner, needle = (float((z[:, 1] - z[:, 0]).max()) for z in (room.model(room.inner), room.model(room.needle)))
    assert -inner / (needle - inner) == pytest.approx(0.95, abs=1e-3)


def test_the_exam_asks_more_than_the_paper_does() -> None:
    net = small()
    x = answered(net, 3)[0]
    for row in x.split(1):
        easy, hard = (hider(net, reach=reach).hide(row) for reach in (None, 0.95))
        with torch.no_grad():
            assert hard.model(easy.needle).argmax(1).tolist() == [0]
            assert easy.model(hard.needle).argmax(1).tolist() == [1]


# ---- guides and stages ----------------------------------------------------------------------


def test_rounding_fails_without_its_guide_and_passes_with_it() -> None:
    net = small()
    model = BitDepth(4)(net)
    data = answered(model)
    alone = mohs.exam(model, data, "linf:0.2", APGD(steps=25), n=5, inner=199, looks=20, reach=None)
    guided = mohs.exam(model, data, "linf:0.2", APGD(steps=25), n=5, inner=199, looks=20, reach=None, guide=Honest)
    assert alone.tested == guided.tested == 5
    assert alone.found == 0
    assert guided.passed


@pytest.mark.parametrize("make", [lambda m: Through(m, {"0": None}), lambda m: Past(m, "1")], ids=["Through", "Past"])
def test_guides_by_name_fit_the_model_and_the_exam(make: Callable[[nn.Module], nn.Module]) -> None:
    class Rounds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 15).round() / 15

    model = nn.Sequential(Rounds(), *small()).eval()
    make(model)
    data = answered(model)
    result = mohs.exam(model, data, "linf:0.2", APGD(steps=25), n=3, inner=199, looks=20, guide=make)
    assert result.passed


def test_stages_run_in_their_order_on_whoever_is_left() -> None:
    net = small()
    data = answered(net, 12)
    useless = PlanStep.make(
        "PGD", {"steps": 2, "step_size": 1e-4}, share=0.25
    )  # two forwards and backwards, and a last look
    strong = PlanStep.make("APGD", {"steps": 50}, share=0.25, start="best", aims=9, rank="distance")

    def sit(*steps: PlanStep) -> Exam:
        return mohs.exam(net, data, "linf:0.2", Plan("p", steps), n=8, inner=199, looks=20)

    assert (sit(useless).found, sit(useless).spent) == (0, 8 * 5)
    assert sit(useless, useless).spent == 2 * 8 * 5
    whole = sit(strong)
    assert whole.found == 8
    assert sit(strong, useless).spent == whole.spent


# ---- the same answer, whatever stands around ------------------------------------------------------------------


def test_equal_bits_whatever_the_order_and_the_company() -> None:
    net = small()
    x, y = answered(net, 10)
    attack = PGD(steps=3, step_size=EPS / 2)
    once = mohs.exam(net, (x, y), "linf:0.2", attack, n=10, inner=199, looks=20)
    order = torch.tensor([7, 2, 9, 0, 4, 1, 3, 8, 5, 6])
    again = mohs.exam(net, (x[order], y[order]), "linf:0.2", attack, n=10, inner=199, looks=20)
    fewer = mohs.exam(net, (x[order], y[order]), "linf:0.2", attack, n=4, inner=199, looks=20)
    known = dict(zip(once.examples.tolist(), once.success.tolist()))
    assert {int(order[i]): s for i, s in zip(again.examples, again.success.tolist())} == known
    for i, s in zip(fewer.examples, fewer.success.tolist()):
        assert known[int(order[i])] == s
    assert [int(order[i]) for i in fewer.examples] == once.examples[:4].tolist()
    assert 0 < once.found < 10


def test_hiding_is_repeatable_and_depends_on_the_seed() -> None:
    net = small()
    x = answered(net, 1)[0]
    a, b, c = (hider(net, seed=seed, reach=None).hide(x).needle for seed in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_the_model_is_left_as_it_was() -> None:
    net = small()
    data = answered(net)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    mohs.exam(net, data, "linf:0.2", PGD(steps=3), n=2, inner=99, looks=10)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not m._forward_pre_hooks and not m._forward_hooks and not m.training for m in net.modules())
    assert all(p.grad is None for p in net.parameters())


def test_only_examples_that_are_right_are_examined() -> None:
    net = small()
    x, y = answered(net, 8)
    y[:5] = (y[:5] + 1) % 3
    result = mohs.exam(net, (x, y), "linf:0.2", FGSM(), n=6, inner=99, looks=10)
    assert sorted(result.examples.tolist()) == [5, 6, 7]
    assert any("3 examples" in note for note in result.notes)


# ---- models of other kinds ------------------------------------------------------------------------------------


def test_the_features_are_those_of_the_last_linear_layer_called() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first, self.unused = nn.Linear(8, 3), nn.Linear(6, 8), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu())

    assert last_linear(Backwards().eval(), torch.rand(2, 6)) == "last"


def test_without_a_linear_layer_the_logits_are_the_features() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Unflatten(1, (1, 24)), nn.Conv1d(1, 10, 24), nn.Flatten()).eval()
    result = mohs.exam(net, answered(net), "linf:0.2", APGD(steps=25), n=3, inner=19, looks=10)
    assert result.layer is None
    assert result.dimension == 10
    assert any("no nn.Linear" in note for note in result.notes)
    assert result.passed


def test_a_single_logit() -> None:
    net = nn.Sequential(*list(small())[:-1], nn.Linear(40, 1)).eval()
    result = mohs.exam(net, answered(net), "linf:0.2", APGD(steps=25), n=3, inner=199, looks=10)
    assert (result.layer, result.passed) == ("4", True)


def test_a_model_that_is_itself_the_linear_layer() -> None:
    net = nn.Linear(24, 3)
    result = mohs.exam(net.eval(), answered(net), "linf:0.2", FGSM(), n=3, inner=99, looks=10)
    assert (result.layer, result.dimension, result.found) == ("", 24, 3)


class Noisy(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + 0.02 * torch.randn_like(x))


def test_a_random_model_is_judged_by_most_of_its_draws() -> None:
    net = Noisy(small())
    data = answered(net.model)
    threat = mohs.Threat(mohs.Linf(EPS), draws=7)
    strong = mohs.exam(net, data, threat, APGD(steps=25), n=3, inner=199, looks=20, reach=0.9)
    weak = mohs.exam(net, data, threat, PGD(steps=25, step_size=EPS / 200), n=3, inner=199, looks=20, reach=0.9)
    assert strong.tested == 3
    assert strong.passed
    assert not weak.passed


def test_a_model_without_gradients_gets_the_needle_of_the_paper() -> None:
    class Cut(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    net = Cut(*small()).eval()
    x = answered(net, 1)[0]
    hard, easy = (hider(net, reach=reach).hide(x) for reach in (0.95, None))
    assert torch.equal(hard.needle, easy.needle)
    result = mohs.exam(net, answered(net), "linf:0.2", Square(steps=300), n=2, inner=199, looks=10)
    assert result.passed


def test_names_and_modes_are_those_of_the_model() -> None:
    net = BitDepth(4)(small())
    net.model[1].train()
    room = Hider(net, "model.4", mohs.Threat.parse("linf:0.2"), 99, None, 10, 0, 64).hide(answered(net, 1)[0])
    assert isinstance(room.model, Binarised)
    names = dict(room.model.named_modules())
    assert all(names[name] is module for name, module in net.named_modules() if name)
    assert net.model[1].training
    assert not net.model[0].training


# ---- what cannot be examined, and what says little ------------------------------------------------------------


def test_untestable_examples_are_counted_with_their_reason() -> None:
    class Deaf(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.zeros_like(x))

    net = Deaf(*small()).eval()
    result = mohs.exam(net, answered(net), "linf:0.2", FGSM(), n=4, inner=19, looks=10)
    assert (result.asked, result.tested, result.passed) == (4, 0, False)
    assert math.isnan(result.rate)
    assert sum(result.untestable.values()) == 4
    assert result.finding.severity == "warn"
    assert "no linear head" in result.finding.saw


def test_where_the_box_leaves_no_room_no_needle_is_planted() -> None:
    net = small()
    with pytest.raises(Untestable, match="no room"):
        hider(net, "linf:3").hide(answered(net, 1)[0])


def test_an_easy_exam_is_made_harder_and_says_little() -> None:
    """In two dimensions a corner is found by looking at random corners."""
    net = small(inputs=2)
    result = mohs.exam(net, answered(net, inputs=2), "linf:0.1", APGD(steps=25), n=4, inner=49, looks=50, reach=None)
    assert result.easy
    assert result.inner == 4 * 49
    assert result.rate == 1.0
    assert not result.passed
    assert (result.finding.id, result.finding.severity) == ("exam", "warn")
    assert any("raised" in note for note in result.notes)


def test_a_finding_holds_the_numbers() -> None:
    flags = torch.tensor([True] * 19 + [False])
    result = Exam("A", "linf:0.1", "4", 10, 99, 50, 21, torch.arange(20), flags, ~flags, {"why": 1})
    assert result.passed
    assert result.interval == pytest.approx((0.7513, 0.9987), abs=1e-4)  # Clopper-Pearson for 19 of 20, from tables
    assert "19 of 20" in result.finding.saw
    assert "1 of 21: why" in result.finding.saw
    assert not Exam("A", "linf:0.1", "4", 10, 99, 50, 41, torch.arange(20), flags, ~flags).passed


@pytest.mark.parametrize("threat", ["l2:inf", "linf:0", "l0:3", "l0-features:3"])
def test_threats_without_a_radius_to_plant_at_are_refused(threat: str) -> None:
    net = small()
    with pytest.raises(ThreatError, match="The exam"):
        mohs.exam(net, answered(net), threat)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n": 0}, "n must be"),
        ({"n": True}, "n must be"),
        ({"inner": 1}, "inner must be"),
        ({"looks": 1}, "looks must be"),
        ({"reach": 1.0}, "reach must"),
        ({"reach": "most"}, "reach must"),
        ({"plan": PGD}, "plan must be"),
        ({"plan": 3}, "plan must be"),
        ({"plan": "no such"}, "no plan"),
    ],
)
def test_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    net = small()
    with pytest.raises(UsageError, match=said):
        mohs.exam(net, answered(net), "linf:0.2", **settings)


def test_other_refusals() -> None:
    net = small()
    x, y = answered(net)
    with pytest.raises(ModelError):
        mohs.exam(lambda x: x, (x, y), "linf:0.2")  # type: ignore[arg-type]
    with pytest.raises(DataError):
        mohs.exam(net, (2 * x, y), "linf:0.2")
    with pytest.raises(ThreatError, match="No attack of the plan"):
        mohs.exam(net, (x, y), mohs.Threat(mohs.Lp(1.5, 0.2), access=mohs.Access.LABEL))


# ---- the parts ------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(2, 60), st.sampled_from([1e-4, 1.0, 1e4]))
def test_a_head_separates_whatever_a_plane_separates(seed: int, dimension: int, rows: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=dimension)
    direction /= np.linalg.norm(direction)
    inner, needle = rng.normal(size=(rows, dimension)), rng.normal(size=(1, dimension))
    gap = float((inner @ direction).max() - (needle @ direction)[0]) + 0.5
    needle = needle + gap * direction  # now separated by at least 0.5 along one direction
    offset = 100 * rng.normal(size=dimension)
    center, weight = fit_head((inner + offset) * scale, (needle + offset) * scale)
    score = [((p + offset) * scale - center) @ weight for p in (inner, needle)]
    assert score[1].min() > score[0].max()


def test_a_head_cannot_single_out_a_point_among_others() -> None:
    rng = np.random.default_rng(0)
    inner = rng.normal(size=(200, 3))
    center, weight = fit_head(inner, inner.mean(0, keepdims=True))
    assert (((inner - center) @ weight) > ((inner.mean(0) - center) @ weight)).any()


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(THREATS), st.booleans())
def test_points_at_the_radius_are_there(seed: int, text: str, boxed: bool) -> None:
    threat = mohs.Threat(mohs.Threat.parse(text).region, box=(0.0, 1.0) if boxed else (-math.inf, math.inf))
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(4, 24, generator=g)
    points = at_radius(threat, x, torch.arange(4) + seed)
    size, eps = sized(points - x, text), threat.region.eps
    assert (size <= eps * (1 + 1e-5)).all()
    assert (size >= eps * (1 - 1e-4)).all()
    assert not boxed or bool(((points >= 0) & (points <= 1)).all())
    assert len(points.unique(dim=0)) == 4

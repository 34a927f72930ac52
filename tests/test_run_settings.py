"""What a caller may ask of a run beyond the attack: confidence, a start, a ranking, and what is refused before any work."""

from __future__ import annotations

import math

import pytest
import torch
from core_models import Counting, conv_net, inputs, relu_net
from torch import Tensor, nn

import mohs
from mohs.attacks import BIM, PGD, DeepFool, by_logit
from mohs.errors import DataError, ThreatError, UsageError


def test_confidence_asks_for_a_clear_win() -> None:
    net, x = conv_net(), inputs(32, 1, 12, 12)
    y = net(x).argmax(1)
    plain = mohs.attack(DeepFool(), net, x, y, "l2:inf")
    sure = mohs.attack(PGD(steps=30, objective=mohs.objectives.margin), net, x, y, "linf:0.3", confidence=0.05)
    won = mohs.Goal.leave(y).margin(net(sure.x))
    assert int(sure.success.sum()) > 3
    assert bool((won[sure.success] > 0.05).all())
    torch.testing.assert_close(sure.margin[sure.success], won[sure.success].detach() - 0.05, atol=1e-5, rtol=1e-4)
    assert bool((mohs.Goal.leave(y).margin(net(plain.x))[plain.success] < 0.05).any()), (
        "the test net would be too steep"
    )


def test_confidence_holds_for_a_target_too() -> None:
    net, x = conv_net(), inputs(32, 1, 12, 12)
    y = net(x).argmax(1)
    out = mohs.attack(PGD(steps=30), net, x, y, "linf:0.5", targets=(y + 1) % 5, confidence=0.02)
    top = net(out.x).topk(2, dim=1).values
    assert int(out.success.sum()) > 3
    assert bool((top[:, 0] - top[:, 1] > 0.02)[out.success].all())


def test_a_start_is_where_the_first_look_goes() -> None:
    net, x = relu_net((6,)), inputs(8, 6)
    y = net(x).argmax(1)
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            seen.append(z.detach().clone())
            return net(z)

    far = torch.ones_like(x)
    for attack in (PGD(steps=2), BIM(steps=2)):
        seen.clear()
        mohs.attack(attack, Spy().eval(), x, y, "linf:0.1", start=far)
        torch.testing.assert_close(seen[0], (x + 0.1).clamp(max=1.0)), "brought into the region"


def test_an_attack_goes_on_from_what_another_found() -> None:
    net, x = conv_net(), inputs(64, 1, 12, 12)
    y = net(x).argmax(1)
    first = mohs.attack(
        PGD(steps=5, objective=mohs.objectives.margin), net, x, y, "linf:0.02", stop=mohs.attacks.Stop.BUDGET
    )
    again = mohs.attack(
        PGD(steps=5, objective=mohs.objectives.margin),
        net,
        x,
        y,
        "linf:0.02",
        start=first.x,
        stop=mohs.attacks.Stop.BUDGET,
    )
    assert bool((again.margin >= first.margin - 1e-6).all())
    assert bool((again.margin > first.margin).any())


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"start": torch.zeros(2, 6)}, DataError, "inputs' shape"),
        ({"start": torch.full((8, 6), math.nan)}, DataError, "row"),
        ({"confidence": -1.0}, UsageError, "confidence"),
        ({"confidence": math.inf}, UsageError, "confidence"),
    ],
)
def test_a_bad_setting_is_refused(settings: dict, error: type, words: str) -> None:
    net, x = relu_net((6,)), inputs(8, 6)
    with pytest.raises(error, match=words):
        mohs.attack(PGD(steps=2), net, x, net(x).argmax(1), "linf:0.1", **settings)


def test_a_region_that_is_not_served_is_refused_before_any_work() -> None:
    net, x = Counting(relu_net((6,))), inputs(8, 6)
    y = net(x).argmax(1)
    before = net.forwards
    with pytest.raises(ThreatError, match=r"DeepFool does not serve l0. It serves: linf, l2, l1, lp"):
        mohs.attack(DeepFool(), net, x, y, "l0:2")
    assert net.forwards == before


def test_more_aims_than_classes_are_refused() -> None:
    net, x = relu_net((6,)), inputs(8, 6)
    y = net(x).argmax(1)
    with pytest.raises(UsageError, match="at most"):
        mohs.attack(PGD(steps=2), net, x, y, "linf:0.1", aims=50, rank=by_logit)


def test_a_row_whose_logits_are_not_finite_is_marked_and_the_others_go_on() -> None:
    net, x = relu_net((6,)), inputs(8, 6)
    y = net(x).argmax(1)

    class Trap(nn.Module):
        """nan wherever the input has moved, for the examples whose first coordinate is high."""

        def forward(self, z: Tensor) -> Tensor:
            return torch.where((z[:, :1] > 0.7), math.nan, net(z))

    out = mohs.attack(PGD(steps=5), Trap().eval(), x, y, "linf:0.01")
    alone = mohs.attack(PGD(steps=5), net, x, y, "linf:0.01")
    bad = x[:, 0] > 0.72
    good = x[:, 0] < 0.68
    assert bool(bad.any())
    assert bool(good.any())
    assert bool(out.error[bad].all())
    assert not bool(out.error[good].any())
    assert not bool(out.success[bad].any())
    assert torch.equal(out.x[good], alone.x[good])


def test_a_second_try_from_a_start_is_another_try() -> None:
    net, x = conv_net(), inputs(16, 1, 12, 12)
    y = net(x).argmax(1)
    job = mohs.attacks.Job(PGD(steps=2), net, x, y, mohs.Threat.parse("linf:0.05"), start=x, restarts=2)
    index = torch.arange(16)
    first, second = job.problem(index, torch.zeros_like(index)), job.problem(index, torch.ones_like(index))
    assert torch.equal(first.start(), x)
    assert not torch.equal(second.start(), x)


@pytest.mark.parametrize("rank", [by_logit, mohs.attacks.by_distance])
def test_the_label_is_never_aimed_at_before_masked_classes(rank: object) -> None:
    net = nn.Linear(6, 5).eval()

    class Masked(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return torch.cat([net(z)[:, :2], torch.full((len(z), 3), -math.inf)], 1)

    x = inputs(20, 6)
    y = Masked()(x).argmax(1)
    job = mohs.attacks.Job(
        PGD(steps=1), Masked().eval(), x, y, mohs.Threat.parse("linf:0.01"), aims=4, rank=rank, batch=32
    )
    assert len(list(job._rank_classes())) == 1
    ranked = job.ranked
    assert not bool((ranked == y.unsqueeze(1)).any())


def test_aims_that_the_access_does_not_pay_for_are_refused_at_once() -> None:
    net, x = relu_net((6,)), inputs(8, 6)
    threat = mohs.Threat(mohs.Linf(0.1), access=mohs.Access.SCORE)
    with pytest.raises(mohs.errors.AccessError, match="needs access LOGIT"):
        mohs.attack(mohs.attacks.Square(steps=3), net, x, net(x).argmax(1), threat, aims=2)
    with pytest.raises(UsageError, match="rank must be"):
        mohs.attack(PGD(steps=3), net, x, net(x).argmax(1), "linf:0.1", aims=2, rank="distance")


@pytest.mark.parametrize("form", ["l1:5", "l2:5"])
def test_square_begins_where_the_box_leaves_it_nothing(form: str) -> None:
    net, x = relu_net((3,)), torch.zeros(16, 3)
    y = net(x).argmax(1)
    for seed in range(8):
        out = mohs.attack(mohs.attacks.Square(steps=3), net, x, y, form, seed=seed)
        assert not bool(out.error.any())
        assert bool(out.x.isfinite().all())

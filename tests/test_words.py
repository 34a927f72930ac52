"""Word substitutions: the region beside all that it allows, HotFlip beside brute force, and the engine on both kinds of change."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_nets import some_ids, text_net
from torch import Tensor, nn

import mohs
from mohs import Goal, Threat, Words
from mohs.attacks import APGD, FGSM, PGD, HotFlip, Stop
from mohs.errors import ThreatError, UsageError
from mohs.evaluation.replay import replay
from mohs.models import WordChoices
from mohs.models.text import choices, chosen, neighbours
from mohs.records import Record

BOX = (-math.inf, math.inf)


def sentences(rows: int = 6, places: int = 4, others: int = 2, seed: int = 0) -> Tensor:
    net = text_net()
    return choices(some_ids(rows, places, seed).double(), neighbours(net.embedding, others))


def everything(x: Tensor, most: int) -> Tensor:
    """All sentences [M, 2, T, C] that differ from one, x [2, T, C], at no more than so many places."""
    _, places, words = x.shape
    found = []
    for pick in itertools.product(range(words), repeat=places):
        if sum(k != 0 for k in pick) <= most:
            plane = torch.zeros(places, words, dtype=x.dtype)
            plane[torch.arange(places), torch.tensor(pick)] = 1
            found.append(torch.stack([x[0], plane]))
    return torch.stack(found)


def model(seed: int = 0) -> WordChoices:
    return WordChoices(text_net(seed)).eval()


# ---- the region -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, 1, 2, 4])
def test_exactly_the_listed_sentences_are_allowed(most: int) -> None:
    x = sentences(1)
    near = everything(x[0], 4)
    x0, eps = x.expand(len(near), -1, -1, -1), torch.full((len(near),), float(most), dtype=x.dtype)
    count = (near[:, 1, :, 0] == 0).sum(1)
    assert torch.equal(Words(most).measure(near, x0), count.to(x.dtype))
    assert torch.equal(Words(most).contains(near, x0, eps), count <= most)


def test_nothing_else_is_allowed() -> None:
    x = sentences(1)
    two, soft, other = x.clone(), x.clone(), x.clone()
    two[0, 1, 0] = 1.0  # all words at once
    soft[0, 1, 1] = torch.tensor([0.0, 0.999, 0.0])
    other[0, 0, 2, 1] += 1  # another alternative
    for bad in (two, soft, other):
        assert float(Words(4).measure(bad, x)) == math.inf
        assert not Words(math.inf).contains(bad, x, torch.tensor([math.inf])).any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), most=st.integers(0, 4))
def test_the_extreme_is_the_best_and_the_projection_the_nearest(seed: int, most: int) -> None:
    x = sentences(1, seed=seed)
    region, eps = Words(most), torch.tensor([float(most)], dtype=x.dtype)
    near = everything(x[0], most)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    best = region.extreme(g, x, eps, BOX)
    assert float((g[:, 1] * best[:, 1]).sum()) == pytest.approx(float((g[:, 1] * near[:, 1]).sum((1, 2)).max()))
    moved = x.clone()
    moved[:, 1] += g[:, 1]
    nearest = region.project(moved, x, eps, BOX)
    apart = (near[:, 1] - moved[:, 1]).square().sum((1, 2))
    assert float((nearest[:, 1] - moved[:, 1]).square().sum()) == pytest.approx(float(apart.min()))
    for point in (best, nearest, region.start(x, eps, BOX, torch.tensor([seed]))):
        assert bool(region.contains(point, x, eps).all())
        assert torch.equal(region.project(point, x, eps, BOX), point)


def test_without_a_gradient_nothing_moves() -> None:
    x = sentences(1).flip(3)  # the clean word comes last
    for most in (1, 4):
        still = Words(most).extreme(torch.zeros_like(x), x, torch.tensor([float(most)], dtype=x.dtype), BOX)
        assert torch.equal(still, x)


def test_a_start_takes_other_words_at_as_many_places() -> None:
    x = sentences(1).expand(200, -1, -1, -1)
    begun = Words(2).start(x, torch.full((200,), 2.0, dtype=x.dtype), BOX, torch.arange(200))
    assert Words(2).measure(begun, x).tolist() == [2.0] * 200
    places = (begun[:, 1, :, 0] == 0).double().mean(0)
    assert bool(((places > 0.35) & (places < 0.65)).all())


def test_threats_of_words_are_read_written_and_ordered() -> None:
    threat = Threat.parse("words:2")
    assert (threat.region, threat.box, str(threat)) == (Words(2), BOX, "words:2")
    assert Threat.parse(str(threat)) == threat == Threat(Words(2)) == Threat.from_dict(threat.to_dict())
    assert threat <= Threat.parse("words:3")
    assert not threat <= Threat.parse("words:1")
    assert not threat <= Threat.parse("l0:5")
    assert Threat.parse("words:inf").minimum
    for bad in ("words:1.5", "words:-1"):
        with pytest.raises(ThreatError, match="words counts places"):
            Threat.parse(bad)


def test_what_knows_only_norms_refuses_words_and_says_so() -> None:
    x, y = sentences().float(), torch.zeros(6, dtype=torch.int64)
    net = model().float()
    with pytest.raises(ThreatError, match="follows a norm"):
        Words(1).steepest(x)
    with pytest.raises(ThreatError, match=r"APGD does not serve words"):
        mohs.attack(APGD(), net, x, y, "words:1")
    with pytest.raises(ThreatError, match="Make \\[N, 2, T, C\\] of token ids"):
        mohs.attack(HotFlip(), net, x[:, 0, 0], y, "words:1")
    with pytest.raises(ThreatError, match="HotFlip does not serve l2"):
        mohs.attack(HotFlip(), net, x, y, "l2:1 in [-inf, inf]")
    with pytest.raises(UsageError, match="width"):
        HotFlip(width=0)


# ---- HotFlip --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targeted", [False, True], ids=["leave", "reach"])
@pytest.mark.parametrize("seed", range(3))
def test_one_word_is_searched_exactly(seed: int, targeted: bool) -> None:
    net, x = model(seed), sentences(12, seed=seed)
    y = net(x).argmax(1)
    targets = (y + 1) % 3 if targeted else None
    out = mohs.attack(HotFlip(width=12), net, x, y, "words:1", targets=targets, stop=Stop.BUDGET)
    truth = exhausted(net, x, y, targets, 1)
    assert torch.allclose(out.margin, truth, atol=1e-9)
    assert torch.equal(out.success, truth > 0)


def exhausted(net: nn.Module, x: Tensor, y: Tensor, targets: Tensor | None, most: int) -> Tensor:
    """The highest margin over all sentences allowed, [N]."""
    found = []
    for i, row in enumerate(x):
        near = everything(row, most)
        label = (y if targets is None else targets)[i].expand(len(near))
        goal = Goal.leave(label) if targets is None else Goal.attain(label)
        with torch.no_grad():
            found.append(goal.margin(net(near)).max())
    return torch.stack(found)


def test_more_words_come_near_the_best_and_never_beyond() -> None:
    equal = 0
    for seed in range(4):
        net, x = model(seed), sentences(12, seed=seed)
        y = net(x).argmax(1)
        one, truth = exhausted(net, x, y, None, 1), exhausted(net, x, y, None, 2)
        for width, steps in ((24, 200), (3, 40)):
            out = mohs.attack(HotFlip(steps, width), net, x, y, "words:2", stop=Stop.BUDGET)
            assert bool((out.margin <= truth + 1e-9).all())
            assert bool(Words(2).contains(out.x, x, torch.full((12,), 2.0, dtype=x.dtype)).all())
            if width == 24:
                assert bool((out.margin >= one - 1e-9).all())
                equal += int((out.margin > truth - 1e-9).sum())
    assert equal >= 0.8 * 48


class Pairs(nn.Module):
    """One word alone brings 2, two others together 5 and 1 each: a greedy first choice has to be undone."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = (x[:, 1, t, 1] for t in range(3))
        gain = 2 * a + b + c + 3 * b * c - 2 * a * (b + c) * 0.25
        return torch.stack([torch.full_like(gain, 4.5), gain], 1)


def test_a_change_is_undone_for_a_better_one_elsewhere() -> None:
    x = choices(torch.tensor([[2.0, 3.0, 4.0]]), torch.tensor([[0], [1], [5], [6], [7]]))
    y = torch.tensor([0])
    assert not mohs.attack(HotFlip(steps=9, width=6), Pairs(), x, y, "words:1").success
    out = mohs.attack(HotFlip(width=12), Pairs(), x, y, "words:2")
    assert out.success.tolist() == [True]
    assert chosen(out.x).tolist() == [[2.0, 6.0, 7.0]]


class Worths(nn.Module):
    """Each word brings a number of its own."""

    def forward(self, x: Tensor) -> Tensor:
        gain = (x[:, 1] * torch.tensor([[0.0, 3.0, 5.0], [0.0, 4.0, 1.0]])).sum((1, 2))
        return torch.stack([torch.full_like(gain, 9.0), gain], 1)


def test_an_exchange_is_ranked_by_what_is_lost_too() -> None:
    x = choices(torch.tensor([[2.0, 3.0]]), torch.tensor([[0, 0], [1, 1], [4, 5], [6, 7]]))
    begun = x.clone()
    begun[0, 1, 0] = torch.tensor([0.0, 1.0, 0.0])  # worth 3: another word there is worth 2 more, one elsewhere 1
    run = {"start": begun, "stop": Stop.BUDGET}
    for steps, gain in ((1, 5.0), (2, 5.0)):
        out = mohs.attack(HotFlip(steps, width=1), Worths(), x, torch.tensor([0]), "words:1", **run)
        assert out.margin.tolist() == [gain - 9.0]


def test_the_answer_is_made_of_the_listed_words_and_beats_other_attacks() -> None:
    net = text_net(1).float()
    ids = some_ids(40, 6)
    x = choices(ids, neighbours(net.embedding, 3))
    whole = WordChoices(net).eval()
    y = whole(x).argmax(1)
    out = mohs.attack(HotFlip(), whole, x, y, "words:2")
    words = chosen(out.x)
    assert bool((words.unsqueeze(2) == x[:, 0]).any(2).all())
    changed = (words != ids).sum(1)
    assert bool((changed <= 2).all())
    assert not (words != ids)[ids == 0].any()  # padding stays padding
    assert torch.equal(net(words).argmax(1) != y, out.success)  # a sentence, not a mixture of words
    for other in (FGSM(), PGD(steps=20)):
        weaker = mohs.attack(other, whole, x, y, "words:2")
        assert bool(Words(2).contains(weaker.x, x, torch.full((40,), 2.0)).all())
        assert int(weaker.success.sum()) <= int(out.success.sum())
    assert 0 < int(out.success.sum()) < 40


def test_what_it_cost_is_counted() -> None:
    net, x = model(), sentences(5)
    with torch.no_grad():
        net.model.classifier.head.bias[0] += 50
    out = mohs.attack(
        HotFlip(steps=100, width=4), net, x, torch.zeros(5, dtype=torch.int64), "words:1", stop=Stop.BUDGET
    )
    rounds = out.backwards
    assert torch.equal(out.forwards, 5 * rounds)  # a gradient, four looks, and no further round where none was better
    assert bool((rounds >= 1).all() and (rounds < 5).all())


def test_without_a_place_to_change_nothing_changes() -> None:
    net, x = model(), sentences(5)
    y = net(x).argmax(1)
    out = mohs.attack(HotFlip(), net, x, y, "words:0")
    assert not out.success.any()
    assert torch.equal(out.x, x)


# ---- the engine -----------------------------------------------------------------------------------------------------


def evaluated(net: nn.Module, x: Tensor, y: Tensor, threat: str, out: Path, **settings: Any) -> Record:
    return mohs.evaluate(
        net.eval(), (x, y), threat, plan="quick", claim="accuracy >= 0.95", out=out, control=8, **settings
    )


def test_an_evaluation_under_words_is_refuted_and_replayed(tmp_path: Path) -> None:
    net = text_net(1).float()
    whole = WordChoices(net).eval()
    x = choices(some_ids(32, 6), neighbours(net.embedding, 3))
    y = whole(x).argmax(1)
    record = evaluated(whole, x, y, "words:1", tmp_path / "r")
    truth = exhausted(whole, x, y, None, 1) > 0
    assert record.verdict is not None
    assert record.verdict.word == "refuted"
    assert torch.equal(torch.from_numpy(record.survived.copy()), ~truth)
    assert replay(record, whole).holds
    assert all(finding.severity != "block" for finding in record.header.checks)


def test_an_evaluation_of_embedded_sentences_is_an_ordinary_one(tmp_path: Path) -> None:
    net = text_net(1).float()
    ids = some_ids(16, 6)
    e = net.embedding(ids).detach()
    y = net(ids).argmax(1)
    record = evaluated(net.classifier, e, y, "l2:3 in [-inf, inf]", tmp_path / "r")
    assert record.verdict is not None
    assert record.verdict.word == "refuted"
    assert replay(record, net.classifier).holds

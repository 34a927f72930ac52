"""What detectors share: scores that depend on the answer, the examples they learn from, and the descent that trains them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mohs.defenses import DETECTORS, LID, Trapdoor
from mohs.defenses._descent import descend
from mohs.defenses._detector import Detector, activations, flat
from mohs.defenses._examples import deal, noisy
from mohs.errors import DataError, ModelError, UsageError
from mohs.problem import Goal


class Given(nn.Module):
    """Thresholds."""

    def __init__(self, threshold: Tensor) -> None:
        super().__init__()
        self.register_buffer("threshold", threshold)


@dataclass(frozen=True)
class Halves(Detector):
    """The first half of an input is its logits, the second its score as a member of each class."""

    def score(self, classifier: nn.Module, state: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, scores = x.chunk(2, dim=1)
        return logits, scores


def answered(logits: Tensor, scores: Tensor, threshold: Tensor) -> Tensor:
    defended = Halves().fitted(nn.Identity().eval(), Given(threshold))
    return defended(torch.cat([logits, scores], 1))


class TestScoresByAnswer:
    @given(st.integers(0, 10**6), st.sampled_from([0.01, 1.0, 100.0]))
    @settings(max_examples=50, deadline=None)
    def test_rejected_exactly_where_the_answer_s_own_score_is_above_its_threshold(
        self, seed: int, scale: float
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        logits, scores = (torch.randn(64, 5, dtype=torch.float64, generator=generator) for _ in range(2))
        threshold = torch.randn(5, dtype=torch.float64, generator=generator)
        out = answered(logits, scale * scores, scale * threshold)
        first = logits.argmax(1)
        above = (scores > threshold).gather(1, first.unsqueeze(1)).squeeze(1)
        assert out.shape == (64, 6)
        assert torch.equal(out.argmax(1), torch.where(above, 5, first))
        assert torch.equal(out.gather(1, first.unsqueeze(1)), logits.gather(1, first.unsqueeze(1)))

    def test_the_margin_does_not_jump_where_one_class_gives_way_to_another(self) -> None:
        # class 1 would be rejected with an excess of 2, class 0 would not
        scores, goal = torch.tensor([[-3.0, 2.0]] * 2).double(), Goal.leave(torch.tensor([0, 0]), reject=2)
        before, behind = torch.tensor([[1e-9, 0.0], [-1e-9, 0.0]]).double()
        out = answered(torch.stack([before, behind]), scores, torch.zeros(2).double())
        assert goal.margin(out).tolist() == pytest.approx([-2.0, -2.0])

    def test_its_scores_are_those_of_the_answers(self) -> None:
        defended = Halves().fitted(nn.Identity().eval(), Given(torch.tensor([1.0, 5.0])))
        x = torch.tensor([[9.0, 0.0, 3.0, 7.0], [0.0, 9.0, 3.0, 7.0]])
        assert defended.defense.scores(defended, x).tolist() == [3.0, 7.0]


def test_names_and_classes_agree() -> None:
    for name, kind in DETECTORS.items():
        assert name.replace("-", "") == kind.__name__.lower()
        with pytest.raises(UsageError, match=rf"{kind.__name__}\(\.\.\.\)\.fit\(model, {kind.taught_by}\)"):
            kind()(nn.Linear(2, 2))


def test_layers_answer_in_the_form_asked_for() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)).eval()
    x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    logits, (maps, last) = activations(net, ["0", "2"], x, lambda value: value)
    assert torch.equal(maps, net[0](x))
    assert torch.equal(last, logits)
    assert torch.equal(activations(net, ["0"], x)[1][0], flat(maps))


class TestExamples:
    def test_none_serves_twice_and_all_serve(self) -> None:
        x = torch.arange(100.0).unsqueeze(1)
        broken = torch.arange(100) % 3 != 0
        shares = deal("LID", x, x + 1, broken, 20, 0.1, 5)
        assert (len(shares.kept), len(shares.held)) == (20, 40)
        whole = torch.cat([shares.kept, shares.taught, shares.held])
        left = sorted(set(range(100)) - set(whole.tolist()))
        assert len(whole.unique()) == len(whole)
        assert left, "those that learn are adversarial"
        assert not bool(broken[left].any())
        assert bool(broken[shares.taught].all())

    def test_too_few_for_the_rate(self) -> None:
        x = torch.rand(37, 2)
        with pytest.raises(DataError, match=r"at least 38 further examples.*rate of 0\.05; got 37"):
            deal("LID", x, x, None, 0, 0.05, 0)
        assert len(deal("LID", x[:36], x[:36], None, 0, 0.055, 0).held) == 18

    def test_noise_is_as_long_as_the_change(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x, changed = torch.rand(2, 6, 1, 3, 3, dtype=torch.float64, generator=generator)
        twin = noisy(x, changed, 3)
        assert torch.allclose((twin - x).flatten(1).norm(dim=1), (changed - x).flatten(1).norm(dim=1))
        assert torch.equal(noisy(x[2:4], changed[2:4], 3), twin[2:4]), "noise belongs to the example, not to its place"
        assert not torch.equal(noisy(x, changed, 4), twin)


class TestDescent:
    def test_it_finds_the_least_squares(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(60, 3, dtype=torch.float64, generator=generator)
        y = x @ torch.tensor([1.0, -2.0, 0.5]).double()
        weight = nn.Parameter(torch.zeros(3).double())
        descend(
            [weight], lambda at, _: (x[at] @ weight - y[at]).square().mean(), 60, epochs=200, batch=20, lr=0.02, seed=0
        )
        assert weight.tolist() == pytest.approx([1.0, -2.0, 0.5], abs=1e-3)
        assert weight.grad is None

    @pytest.mark.parametrize("n", [1, 7, 8, 9, 15, 17])
    def test_each_epoch_sees_all_in_batches_of_about_one_size(self, n: int) -> None:
        weight, seen = nn.Parameter(torch.zeros(1)), []

        def loss(at: Tensor, generator: torch.Generator) -> Tensor:
            seen.append(at.tolist())
            return weight.square().sum()

        descend([weight], loss, n, epochs=2, batch=8, lr=0.1, seed=0)
        half = len(seen) // 2
        assert [sorted(itertools.chain(*part)) for part in (seen[:half], seen[half:])] == [list(range(n))] * 2
        assert {len(part) for part in seen} <= {n // half, n // half + 1}
        assert n == 1 or min(map(len, seen)) > 1

    def test_nothing_else_gathers_a_gradient(self) -> None:
        weight, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        before = torch.get_rng_state()
        descend([weight], lambda _, __: (weight * other).square().sum(), 4, epochs=1, batch=2, lr=0.1, seed=0)
        assert other.grad is None
        assert weight.tolist() < [1.0]
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_loss_that_is_not_finite_ends_it(self) -> None:
        weight = nn.Parameter(torch.ones(1))
        with pytest.raises(ModelError, match=r"became inf in epoch 1 of 3.*lr=0\.5"):
            descend([weight], lambda _, __: (weight / 0).sum(), 4, epochs=3, batch=2, lr=0.5, seed=0)


def test_trapdoors_come_first() -> None:
    generator = torch.Generator().manual_seed(0)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(9, 3)).eval(), torch.rand(90, 1, 3, 3, generator=generator)
    guarded = LID(k=3, references=10).fit(net, x, x + 0.1)
    with pytest.raises(UsageError, match="a rejection"):
        Trapdoor(side=2).fit(guarded, x, torch.zeros(90, dtype=torch.int64))

"""Random models: what confirms a break, when a row of an attack ends, and what a record says of single draws."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn

import mohs
from mohs.attacks import PGD
from mohs.cli import screen
from mohs.errors import UsageError
from mohs.evaluation import Plan, PlanStep, _scoring, confirm, confirmation, replay
from mohs.evaluation.confirmation import ALPHA, EARLY, asked, drawn, fresh, level, needed
from mohs.objectives import margin
from mohs.problem import Findings, Goal, Problem
from mohs.records import SCORE, Draws, Record
from mohs.records.ledger import Ledger
from mohs.reports import plain, words
from mohs.target import Target
from mohs.threat import Threat

THREAT = Threat.parse("linf:0.1")
RANDOM = Threat(THREAT.region, draws=20)


class Planted(nn.Module):
    """Right on inputs all of whose values are quarters; on others wrong with a known probability."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        moved = (x.detach().flatten(1) * 4 % 1 != 0).any(1)
        wrong = moved & (torch.rand(len(x)) < self.share)
        lead = torch.where(wrong, 1.0, -1.0) + 0.001 * x.flatten(1).sum(1)  # a gradient to follow
        return torch.stack([torch.zeros_like(lead), lead], 1)


class Ramp(nn.Module):
    """Wrong where its input is raised by more than ``middle``, plus noise of a standard deviation of 0.01: how often is known."""

    def __init__(self, middle: float = 0.05, most: float = 1.0) -> None:
        super().__init__()
        self.middle, self.most, self.calls = middle, most, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        lead = x.flatten(1).mean(1).clamp(max=self.most) - self.middle + 0.01 * torch.randn(len(x))
        return torch.stack([torch.zeros_like(lead), 100 * lead], 1)

    def share(self, x: Tensor) -> Tensor:
        """With which probability a draw is wrong."""
        lead = x.flatten(1).mean(1).clamp(max=self.most) - self.middle
        return torch.special.ndtr(lead / 0.01)


def moved(rows: int) -> tuple[Tensor, Tensor]:
    return torch.full((rows, 2), 0.1), torch.zeros(rows, dtype=torch.int64)


def clean(rows: int) -> tuple[Tensor, Tensor]:
    x = torch.randint(5, (rows, 1, 4, 4), generator=torch.Generator().manual_seed(0)) / 4
    return x, torch.zeros(rows, dtype=torch.int64)


# ---- the test --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [20, 100, 205])
@pytest.mark.parametrize("look", [1, 2, 10])
def test_the_threshold_is_the_exact_one(draws: int, look: int) -> None:
    wrong = needed(draws, look)
    assert binom.sf(wrong - 1, draws, 0.5) <= level(look) / 2 < binom.sf(wrong - 2, draws, 0.5)


def test_the_error_rates_of_all_looks_add_up() -> None:
    assert sum(level(k) for k in range(1, 100)) < ALPHA
    assert ALPHA <= 0.05
    assert needed(4) == 5  # four draws reject nothing


@pytest.mark.parametrize(("share", "least", "most"), [(0.5, 0.0, ALPHA), (0.4, 0.0, 1e-4), (0.9, 0.999, 1.0)])
def test_ten_looks_break_what_is_broken_and_little_else(
    share: float, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, random = 400, np.random.default_rng(0)
    monkeypatch.setattr(confirmation, "_wrong", lambda model, point, label, m, reject: int(random.binomial(m, share)))
    x, y = moved(n)
    broken = torch.zeros(n, dtype=torch.bool)
    for look in range(1, 11):
        broken |= confirm(Planted(share), x, y, RANDOM, look=look)
    found = float(broken.double().mean())
    assert least - 3 * math.sqrt(least * (1 - least) / n) <= found <= most + 3 * math.sqrt(most * (1 - most) / n)


@pytest.mark.parametrize(("share", "draws"), [(0.02, 20), (0.98, 20), (0.6, 100)])
def test_what_is_clear_early_is_not_asked_on(share: float, draws: int) -> None:
    x, y = moved(20)
    ids = torch.arange(20)
    seen = asked(Planted(share), x, y, ids, torch.ones_like(ids), RANDOM, 0)
    assert int(seen.drawn.median()) == draws
    assert torch.equal(seen.broken, confirm(Planted(share), x, y, RANDOM))
    for row in range(20):  # the same draws, but for where they end
        n, one = int(seen.drawn[row]), slice(row, row + 1)
        assert torch.equal(
            fresh(Planted(share), x[one], y[one], ids[one], torch.ones(1, dtype=torch.int64), n, 0), seen.wrong[one]
        )
        given_up = n == 20 and not seen.broken[row]
        assert bool(seen.broken[row]) == (int(seen.wrong[row]) >= needed(n))
        assert not given_up or int(seen.wrong[row]) <= 5


def test_draws_belong_to_seed_example_and_look() -> None:
    x, y = moved(40)
    ids, looks = torch.arange(40), torch.ones(40, dtype=torch.int64)
    state = torch.get_rng_state()
    all_ = fresh(Planted(0.5), x, y, ids, looks, 100, 0)
    assert torch.equal(state, torch.get_rng_state())
    some = torch.tensor([39, 3, 17])
    assert torch.equal(fresh(Planted(0.5), x[some], y[some], some, looks[some], 100, 0), all_[some])
    others = [fresh(Planted(0.5), x, y, ids, looks + 1, 100, 0), fresh(Planted(0.5), x, y, ids, looks, 100, 1)]
    for other in [*others, all_.roll(16)]:  # another look, another seed, another example in the same place
        assert abs(np.corrcoef(all_, other)[0, 1]) < 0.5
        assert not torch.equal(all_, other)


class Together(nn.Module):
    """Draws once for the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        right = float(torch.rand(()) < 0.5)
        return torch.tensor([right, 1 - right]).expand(len(x), 2)


def test_examples_share_no_draw_of_a_model_that_draws_once_per_batch() -> None:
    x, y = moved(400)
    ids = torch.arange(400)
    wrong = fresh(Together(), x, y, ids, torch.ones_like(ids), 100, 0).double()
    assert abs(float(wrong.mean()) - 50) < 3 * 5 / 20
    assert 0.85 < float(wrong.var()) / 25 < 1.15  # a binomial's: examples that share a draw would all stand alike
    assert abs(np.corrcoef(wrong[:-1], wrong[1:])[0, 1]) < 0.15


def test_draws_belong_to_the_numbers_that_examples_are_given() -> None:
    x, y = moved(40)
    numbers = torch.arange(40).flip(0) + 3
    one = confirm(Planted(0.63), x, y, RANDOM, ids=numbers)
    some = torch.tensor([4, 30])
    assert 5 < int(one.sum()) < 35
    assert torch.equal(confirm(Planted(0.63), x[some], y[some], RANDOM, ids=numbers[some]), one[some])
    assert not torch.equal(confirm(Planted(0.63), x, y, RANDOM), one)
    with pytest.raises(UsageError, match="name each example once"):
        confirm(Planted(0.63), x[:2], y[:2], RANDOM, ids=torch.tensor([5, 5]))


def test_of_a_deterministic_model_one_answer_decides() -> None:
    x, y = moved(3)
    model = Planted(1.0)
    assert confirm(model, x, y, THREAT).all()
    assert not confirm(model, x.round(), y, THREAT).any()


# ---- the attack ------------------------------------------------------------------------------------------------------


def climb(model: nn.Module, rows: int = 32, **settings: int) -> mohs.Outcome:
    attack = PGD(steps=24, step_size=0.005, random_start=False, objective=margin)
    x, y = torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.int64)
    return mohs.attack(attack, model, x, y, RANDOM, average=4, **settings)


def test_a_row_goes_on_after_it_won_by_luck() -> None:
    model = Ramp()
    found = climb(model)
    assert found.success.all()
    assert float(model.share(found.x).min()) > 0.8  # half of the draws are wrong three steps earlier
    assert float(found.forwards.double().mean()) < 24 * (4 + 20)  # and it ends before its budget is spent
    assert float(found.x.amax()) < 0.1


def test_without_a_clear_win_the_best_point_counts_and_no_row_is_cancelled() -> None:
    model = Ramp(most=0.0525)  # at most 60% of the draws are wrong
    found = climb(model, restarts=2)
    assert found.success.all()
    assert float(model.share(found.x).mean()) > 0.58
    assert int((found.backwards == 2 * 24 * 4).sum()) > 28  # 19 of 20 draws are wrong once in 2,000 looks
    clear = climb(Ramp(), restarts=2)
    assert bool((clear.restart == 0).all())


def test_each_draw_is_counted() -> None:
    model = Ramp()
    found = climb(model, rows=1, batch=1)
    assert int(found.forwards) == model.calls == found.spent - int(found.backwards)


# ---- the evaluation --------------------------------------------------------------------------------------------------


def evaluated(share: float, out: Path | None = None, n: int = 32) -> Record:
    steps = [PlanStep.make("PGD", {"steps": 2, "step_size": 0.01 + 0.01 * i}) for i in range(5)]
    return mohs.evaluate(
        Planted(share).eval(), clean(n), RANDOM, plan=Plan("six", tuple(steps)), adaptive="off", control=0, out=out
    )


def test_an_evaluation_is_not_won_by_luck_and_names_both_protocols(tmp_path: Path) -> None:
    record = evaluated(0.5, tmp_path / "even")
    assert record.clean_accuracy == 1
    assert int((record.breaker >= 0).sum()) <= 2
    attacks = record.draws.attack != SCORE
    assert attacks.sum() > 32  # many looks were lucky enough to be asked again
    assert set(record.draws.drawn[attacks].tolist()) <= {drawn(RANDOM) // EARLY, drawn(RANDOM)}
    assert record.expected_accuracy == pytest.approx(0.5, abs=3 * 0.5 / math.sqrt(32 * 20))
    assert record.header.totals.expected_accuracy == record.expected_accuracy
    last = max(record.attacks)
    assert record.confirmation(0, range(32)).tolist() == [1] * 32
    asked = [int(((record.draws.example == i) & attacks & (record.draws.attack < last)).sum()) for i in range(32)]
    assert record.confirmation(last, range(32)).tolist() == [1 + k for k in asked]
    said = plain.text(record)
    assert "majority of the model's draws" in said
    assert f"chance of {record.expected_accuracy:.1%}" in said
    assert any("majority" in how for name, how in words.threat_rows(record.header) if name == "Randomness")


def test_what_is_nearly_always_wrong_is_broken_and_replayed_draw_by_draw(capsys: pytest.CaptureFixture[str]) -> None:
    record = evaluated(0.9, n=24)
    assert record.robust_accuracy == 0
    assert record.expected_accuracy == pytest.approx(0.1, abs=0.05)
    again = replay(record, Planted(0.9).eval())
    assert again.holds
    assert again.points == 24
    assert again.other_draws == ""
    rows = record.draws.attack == 0
    ids, points = record.points(0, record.draws.example[rows].tolist())
    seen = asked(
        Planted(0.9).eval(), torch.from_numpy(points), torch.zeros(len(ids), dtype=torch.int64), torch.from_numpy(ids),
        torch.from_numpy(record.confirmation(0, ids)), RANDOM, record.header.seed,
    )  # fmt: skip
    assert seen.wrong.tolist() == record.draws.wrong[rows].tolist()
    assert seen.drawn.tolist() == record.draws.drawn[rows].tolist()
    assert not replay(record, Planted(0.5).eval()).confirmed
    for other in ({"device": "cuda:1"}, {"torch": "1.0.0+cpu"}):
        made = record.header.environment.model_copy(update=other)
        record.header = record.header.model_copy(update={"environment": made})
        seen = replay(record, Planted(0.9).eval())
        assert "gives other random numbers" in seen.other_draws
        screen.replayed(record, seen)
        assert "Replay where the run was made" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("killed", [1, 2])
def test_a_run_that_is_killed_between_two_parts_of_the_scores_goes_on(
    killed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluated(0.9, tmp_path / "whole", n=12)
    monkeypatch.setattr(_scoring, "PART", 5)
    put, parts = Ledger.put_draws, []

    def put_draws(self: Ledger, rows: Draws) -> None:
        parts.append(len(rows))
        if len(parts) == 1 + killed:
            raise KeyboardInterrupt
        put(self, rows)

    monkeypatch.setattr(Ledger, "put_draws", put_draws)
    with pytest.raises(KeyboardInterrupt):
        evaluated(0.9, tmp_path / "run", n=12)
    assert Record.load(tmp_path / "run").scores is None
    again = evaluated(0.9, tmp_path / "run", n=12)
    assert parts == ([5, 5, 5, 2] if killed == 1 else [5, 5, 2, 2])
    assert again.header.ledger_digest == whole.header.ledger_digest
    assert again.scores.tolist() == whole.scores.tolist()


def test_earlier_confirmations_are_asked_of_the_ledger_as_the_record_counts_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, list[int], list[int]]] = []
    made = Ledger.confirmations

    def confirmations(self: Ledger, attack: int, examples: Any) -> Any:
        found = made(self, attack, examples)
        asked.append((attack, list(examples), found.tolist()))
        return found

    monkeypatch.setattr(Ledger, "confirmations", confirmations)
    record = evaluated(0.5, n=16)
    assert any(max(k, default=0) > 1 for _, _, k in asked)
    for attack, examples, earlier in asked:
        assert record.confirmation(attack, examples).tolist() == [1 + k for k in earlier]


def test_a_deterministic_model_has_no_draws() -> None:
    record = mohs.evaluate(
        Planted(0.0).eval(), clean(20), THREAT, plan=Plan("one", (PlanStep.make("PGD", {"steps": 2}),)), adaptive="off"
    )
    assert (len(record.draws), record.scores, record.expected_accuracy) == (0, None, None)
    assert "single draw" not in record.describe()


def test_the_judge_asks_about_nominated_rows_alone_and_only_while_they_look_better() -> None:
    asked: list[int] = []

    class Counted(Ramp):
        def forward(self, x: Tensor) -> Tensor:
            asked.append(len(x))
            return super().forward(x)

    x0, zero = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    wide, eps = Threat.parse("linf:0.5"), torch.full((4,), 0.5)
    target = Target(Counted(), draws=20)
    problem = Problem(target, wide, x0, eps, Goal.leave(zero), zero, zero, zero, zero, Findings.none(x0))
    points = x0 + torch.tensor([[0.2], [0.2], [0.0], [0.01]])
    assert problem.look(points).met.tolist() == [True, True, False, False]
    assert asked == [4, *[2] * 20]
    asked.clear()
    later = x0 + torch.tensor(
        [[0.15], [0.3], [0.0], [0.01]]
    )  # one looks worse than before, one better; both meet the goal
    assert problem.look(later).met.tolist() == [True, True, False, False]
    assert asked == [4, *[1] * 20]
    assert problem.found.x[:2, 0].tolist() == pytest.approx([0.2, 0.3])
    assert problem.found.met.tolist() == problem.found.clear.tolist() == [True, True, False, False]
    assert problem.found.forwards.tolist() == [1 + 20 + 1, 1 + 20 + 1 + 20, 2, 2]

"""Planted models that hide their gradients: the engine must find by itself what breaks them, and leave honest ones alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from planted_models import Hidden, Layer, Wrapped, coarse, dead
from torch import Tensor, nn

import mohs
from mohs import defenses
from mohs.defenses._backward import changed
from mohs.evaluation import _stages, tactics
from mohs.evaluation.checks import Probe, examine
from mohs.evaluation.plans import Plan, PlanStep
from mohs.gradients import Smooth
from mohs.guide import Guide
from mohs.threat import Threat

Build = Callable[[nn.Module], nn.Module]


def through_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(np.round(x.detach().numpy() * 7) / 7)


def noisy_gradient(x: Tensor) -> Tensor:
    return changed(x, lambda g: g + 10 * g.abs().mean() * torch.randn_like(g))


def after_each_relu(net: nn.Module) -> nn.Module:
    net = copy.deepcopy(net)
    for name, child in list(net.named_children()):
        if isinstance(child, nn.ReLU):
            setattr(net, name, nn.Sequential(child, Layer(dead)))
    return net.eval()


def chain(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(*parts).eval()


PLANTED: dict[str, tuple[Build, str, str]] = {
    "a layer that rounds": (lambda net: chain(Layer(coarse), net), "zero-gradient", "through 0"),
    "a rounding call": (lambda net: Wrapped(lambda n, x: n(coarse(x)), net).eval(), "zero-gradient", "straight through"),
    "rounding in a model that shows nothing": (
        lambda net: Hidden(chain(Layer(coarse), net)).eval(), "zero-gradient", "straight through"
    ),
    "detached": (lambda net: Wrapped(lambda n, x: n(x.detach()), net).eval(), "no-gradient", "straight through"),
    "a codec in numpy": (lambda net: Hidden(chain(Layer(through_numpy), net)).eval(), "no-gradient", "cut off"),
    "a dead layer": (lambda net: chain(Layer(dead), net), "zero-gradient", "through 0"),
    "dead layers inside": (after_each_relu, "zero-gradient", "through 6.1, 3.1, 1.1"),
    "noise on the gradient": (lambda net: chain(Layer(noisy_gradient), net), "gradient-promise", "through 0"),
    "saturated probabilities": (
        lambda net: Wrapped(lambda n, x: (100 * n(x)).softmax(1), net).eval(), "output-type", "goes into the softmax"
    ),
    "noise and rounding": (
        lambda net: Hidden(chain(Layer(lambda x: coarse(x + 0.05 * torch.randn_like(x))), net)).eval(),
        "zero-gradient", "straight through",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def data() -> mohs.data.Dataset:
    return mohs.data.load("bundled:fashion-mnist", n=60)


def small() -> nn.Module:
    """The bundled net, whose layers 1, 3 and 6 are ReLUs."""
    return mohs.models.load("bundled:fashion-natural")


def chosen(model: nn.Module, data: mohs.data.Dataset, believe: bool = True) -> tuple[tactics.Choice, list[str]]:
    threat = Threat.parse("linf:0.1")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        probe = Probe(model, data.x, data.y, threat, batch=64)
        findings = examine(probe)
        if probe.random:
            threat = probe.threat = Threat(threat.region, draws=20)
        choice = tactics.choose(probe, findings, threat, 0, 64, believe=believe)
    return choice, [f.id for f in findings if f.severity in ("warn", "block")]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_model_trips_its_check_and_is_broken_all_the_same(name: str, data: mohs.data.Dataset) -> None:
    build, check, found = PLANTED[name]
    choice, loud = chosen(build(small()), data)
    assert check in loud
    assert found in choice.tactic.name
    first, best = choice.trials[0], max(choice.trials, key=lambda t: t.broken)
    assert best.broken >= 0.8 * best.n
    assert first.broken <= 0.5 * first.n
    assert next(t for t in choice.trials if t.tactic is choice.tactic).broken >= best.broken - tactics.CLEARLY


@pytest.mark.parametrize("name", ["fashion-natural", "fashion-pgd"])
def test_an_honest_net_costs_nothing_and_keeps_its_gradients(name: str, data: mohs.data.Dataset) -> None:
    choice, loud = chosen(mohs.models.load(f"bundled:{name}"), data)
    assert loud == []
    assert choice == tactics.Choice(tactics.PLAIN)


def test_only_noise_is_averaged(data: mohs.data.Dataset) -> None:
    choice, loud = chosen(chain(Layer(lambda x: x + 0.3 * torch.randn_like(x)), small()), data)
    assert "zero-gradient" not in loud
    first, second = (t.tactic.average for t in choice.trials)
    assert first == 1
    assert second is not None
    assert second > 1


def test_a_declaration_is_used_or_withheld(data: mohs.data.Dataset) -> None:
    model = defenses.BitDepth(3)(small()).eval()
    said, _ = chosen(model, data)
    assert said.tactic.name == "as the defense declares"
    found, _ = chosen(model, data, believe=False)
    assert found.tactic.name != "as the defense declares"
    broken = [next(t.broken for t in c.trials if t.tactic is c.tactic) for c in (said, found)]
    assert abs(broken[0] - broken[1]) <= tactics.CLEARLY


def plan() -> Plan:
    return Plan("short", (PlanStep.make("PGD", {"steps": 10}),))


def test_the_record_tells_what_was_done(data: mohs.data.Dataset, tmp_path: Path) -> None:
    model = chain(Layer(coarse), small())
    naive = mohs.evaluate(model, data, "linf:0.1", plan=plan(), adaptive="off", control=0)
    record = mohs.evaluate(
        model, data, "linf:0.1", plan=plan(), control=0, out=tmp_path / "run", claim="accuracy >= 0.5"
    )
    assert naive.verdict is None
    assert [f.severity for f in naive.header.checks if f.id == "zero-gradient"] == ["block"]
    assert record.robust_accuracy < 0.2
    assert record.verdict is not None
    assert record.verdict.word == "refuted"
    (finding,) = [f for f in record.header.checks if f.id == "zero-gradient"]
    assert finding.severity == "warn"
    assert finding.remedy.startswith("Done: all attacks take their gradients through 0.")
    (tactic,) = [t for t in record.header.tactics if t.chosen]
    assert tactic.name == "through 0"
    page = mohs.reports.render(record, tmp_path / "page.html").read_text()
    assert "Where the gradients came from" in page
    assert "through 0" in page
    assert "Gradients: " in mohs.reports.text(record)
    again = mohs.evaluate(model, data, "linf:0.1", plan=plan(), control=0)
    assert again.header.ledger_digest == record.header.ledger_digest


def test_a_random_model_is_scored_on_fresh_draws(data: mohs.data.Dataset) -> None:
    model = chain(Layer(lambda x: x + 0.2 * torch.randn_like(x)), small())
    record = mohs.evaluate(model, data, "linf:0.1", plan=plan(), control=0)
    assert record.header.threat["draws"] == tactics.DRAWS
    off = mohs.evaluate(model, data, "linf:0.1", plan=plan(), control=0, adaptive="off")
    assert off.header.threat["draws"] == 0
    assert any(f.id == "randomness" and f.severity == "block" for f in off.header.checks)


def test_a_box_that_the_defense_does_not_know_is_refused(data: mohs.data.Dataset) -> None:
    model = defenses.JPEG(75)(small()).eval()
    with pytest.raises(mohs.errors.ThreatError, match=r"need inputs in \[0, 1\]"):
        mohs.evaluate(model, data, "linf:8 in [0, 255]", plan=plan())


def test_the_exam_uses_the_gradients_of_the_attacks(data: mohs.data.Dataset) -> None:
    model = chain(Layer(coarse), small())
    record = mohs.evaluate(model, data, "linf:0.1", plan="quick", control=0, exam=6)
    (finding,) = [f for f in record.header.checks if f.id == "exam"]
    assert "planted adversarial points" in finding.saw
    assert record.header.identity != mohs.evaluate(model, data, "linf:0.1", plan="quick", control=0).header.identity
    with pytest.raises(mohs.errors.UsageError, match="exam must be"):
        mohs.evaluate(model, data, "linf:0.1", exam=-1)
    with pytest.raises(mohs.errors.ThreatError, match="needs a norm, not l0, patch or words"):
        mohs.evaluate(model, data, "l0:3", exam=4)


def test_where_nothing_works_the_block_stays(data: mohs.data.Dataset) -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.eye(10)[torch.zeros(len(x), dtype=torch.int64)] + 0 * x.flatten(1).sum(1, keepdim=True)

    zeros = mohs.data.Dataset(data.x, torch.zeros_like(data.y))
    record = mohs.evaluate(Constant().eval(), zeros, "linf:0.1", plan=plan(), control=0, claim="accuracy >= 0.5")
    assert record.verdict is not None
    assert record.verdict.word == "blocked"


def test_what_cannot_run_guides_no_plan() -> None:
    broken = tactics.Trial(tactics.PLAIN, 0, 4, -math.inf, 0, error="no gradient", left=(0, 1, 2, 3))
    costly = tactics.Tactic("dear")

    def tried(tactic: tactics.Tactic, after: tactics.Trial | None = None, steps: int = 15) -> tactics.Trial:
        assert after is None, "nothing was left to others by what did not run"
        return tactics.Trial(tactic, 0, 4, -1.0, 9, left=(0, 1, 2, 3))

    assert tactics._dearer(costly, broken, tried)[0].tactic is costly
    assert (
        tactics._dearer(costly, broken, lambda t: tactics.Trial(t, 0, 4, 0.0, 0, error="neither"))[0].tactic
        is tactics.PLAIN
    )
    finding = mohs.records.Finding(id="no-gradient", name="", severity="block", saw="", means="", remedy="")
    lucky = tactics.Trial(tactics.Tactic("other"), 1, 4, 0.0, 9)
    for chosen, severity in ((broken, "block"), (lucky, "warn")):
        (said,) = tactics.remedied([finding], tactics.Choice(chosen.tactic, (broken, lucky)))
        assert said.severity == severity


def test_a_guide_that_cannot_run_says_why(data: mohs.data.Dataset) -> None:
    class Refuses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise mohs.errors.ModelError("No. Not today.")

    bad = tactics.Tactic("refuses", lambda model: Refuses().eval())
    tried = tactics.trial(bad, small(), data.x[:4], data.y[:4], Threat.parse("linf:0.1"), 0, 4)
    assert (tried.broken, tried.error) == (0, "No")


@pytest.mark.parametrize("value", ["yes", "", None])
def test_an_unknown_way_to_adapt_is_refused(value: object, data: mohs.data.Dataset) -> None:
    with pytest.raises(mohs.errors.UsageError, match="'declared', 'blind' or 'off'"):
        mohs.evaluate(small(), data, "linf:0.1", adaptive=value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first", "dear", "longer", "guides", "second"),
    [
        (15, 1, 0, "cheap", None),  # adds next to nothing
        (15, 3, 5, "cheap", None),  # as many passes of the cheap one add clearly more
        (15, 3, 2, "cheap", "dear"),  # adds something that steps do not, on a few
        (15, 17, 16, "cheap", "dear"),  # not clearly more than the same passes of the cheap one
        (4, 9, 5, "dear", "cheap"),  # adds more than the cheap one broke, which may have broken others
        (0, 12, 0, "dear", None),
    ],
)
def test_a_dear_tactic_is_held_against_steps_for_the_same_price(
    first: int, dear: int, longer: int, guides: str, second: str | None
) -> None:
    cheap, costly = tactics.Tactic("cheap"), tactics.Tactic("dear", lambda model: model, 1)
    left = tuple(range(first, 32))
    best = tactics.Trial(cheap, first, 32, 0.0, 900, left=left, each=30.0)
    asked: list[tuple[str, tuple[int, ...], int]] = []

    def tried(tactic: tactics.Tactic, after: tactics.Trial, steps: int = tactics.STEPS) -> tactics.Trial:
        asked.append((tactic.name, after.left, steps))
        won = dear if tactic is costly else longer
        return tactics.Trial(
            tactic, won, len(left), 0.0, 0, left=left[won:], each=270.0, after=after.tactic.name, steps=steps
        )

    chosen, kept = tactics._dearer(costly, best, tried)
    assert chosen.tactic.name == guides
    assert (kept.name if kept else None) == second
    assert asked[0] == ("dear", left, tactics.STEPS)
    assert asked[1:] == ([] if dear < tactics.CLEARLY else [("cheap, 135 steps", left, 135)])  # 9 times the price


@pytest.mark.parametrize(
    ("honest", "other", "kept"),
    [
        ((0, 1, 2), (0, 1, 9), "honest"),  # breaks 2 that the best left: who is far ahead still misses some
        ((7, 8), (1, 2), "other"),
        ((8, 9), (0, 9), "other"),
        ((7, 8, 9), (7, 8, 9), "honest"),  # neither adds any, but what is declared is not ruled out by so few
    ],
)
def test_what_a_near_tie_passes_over_is_left_for_the_survivors(
    honest: tuple[int, ...], other: tuple[int, ...], kept: str
) -> None:
    best = tactics.Trial(tactics.PLAIN, 7, 10, 0.0, 1, left=(7, 8, 9))
    trials = [
        best,
        tactics.Trial(tactics.Tactic("other"), 8, 10, 0.0, 1, left=other),
        tactics.Trial(tactics.Tactic("honest", against="declared"), 7, 10, 0.0, 1, left=honest),
        tactics.Trial(tactics.Tactic("dear"), 3, 3, 0.0, 1, left=(), after="gradients as they are"),
        tactics.Trial(tactics.Tactic("broken"), 0, 10, 0.0, 1, error="no", left=()),
    ]
    found = tactics._passed_over(trials, best)
    assert found is not None
    assert found.name == kept
    assert tactics._passed_over(trials, tactics.Trial(tactics.PLAIN, 10, 10, 0.0, 1)) is None
    few = replace(best, left=(7,))
    assert tactics._passed_over([few, trials[1]], few) is (None if 7 in other else trials[1].tactic)
    assert tactics._passed_over([best, replace(trials[1], left=(7, 8, 9))], best) is None


def other_gradients() -> tuple[tactics.Choice, nn.Module]:
    """Honest gradients for the plan, smoothed ones for its survivors; and a model that is broken by neither everywhere."""
    model = defenses.BitDepth(3)(mohs.models.load("bundled:fashion-pgd")).eval()
    honest, dear = tactics.Tactic("honest", defenses.Honest), tactics.Tactic("smooth", lambda m: Smooth(m, 0.05, 2), 1)
    trials = (
        tactics.Trial(tactics.PLAIN, 0, 8, 0.0, 1), tactics.Trial(honest, 5, 8, 0.0, 1),
        tactics.Trial(dear, 2, 3, 0.0, 1, after="honest"), tactics.Trial(replace(honest), 1, 3, 0.0, 1, steps=99),
    )  # fmt: skip
    return tactics.Choice(honest, trials, dear), model


def test_what_was_left_for_the_survivors_is_tried_on_them(
    data: mohs.data.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice, model = other_gradients()
    monkeypatch.setattr(tactics, "choose", lambda *a, **k: choice)
    guides: list[str] = []
    job = _stages.Job

    def watched(*args: Any, **settings: Any) -> Any:
        guides.append(type(settings["guide"]).__name__)
        return job(*args, **settings)

    monkeypatch.setattr(_stages, "Job", watched)
    record = mohs.evaluate(model, data.take(24), "linf:0.1", plan=plan(), control=0)
    (first,) = [s for s in record.header.plan.steps if s.note.startswith("added")][:1]
    assert first.note == "added after the plan because of: other gradients"
    assert first.config.endswith(", gradients smooth")
    assert guides[0] == "Honest"
    assert "Smooth" in guides
    assert [(t.chosen, t.second) for t in record.header.tactics][1:] == [(True, False), (False, True), (False, False)]
    (said,) = [f for f in record.header.checks if f.id == "second-gradients"]
    assert said.saw.startswith("Done: APGD-50")
    assert "gradients smooth broke" in said.saw
    assert "took them smooth, which broke 2 of the 3 that were left" in mohs.reports.text(record)


def test_nothing_is_announced_that_does_not_run(data: mohs.data.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    choice, model = other_gradients()
    monkeypatch.setattr(tactics, "choose", lambda *a, **k: choice)
    record = mohs.evaluate(model, data.take(8), Threat(mohs.Linf(0.1), queries=20), plan=plan(), control=0)
    assert len(record.header.plan.steps) == 1
    assert not any(t.second for t in record.header.tactics)
    assert not any(f.id == "second-gradients" for f in record.header.checks)
    assert "smooth" not in mohs.reports.text(record).split("Gradients: ")[1].split("\n")[0]


@pytest.mark.parametrize(
    ("plain", "other", "severity"), [(4, 4, "warn"), (0, 5, "warn"), (0, 0, "block"), (3, 0, "warn")]
)
def test_a_block_stands_only_where_nothing_broke_anything(plain: int, other: int, severity: str) -> None:
    blocked = mohs.records.Finding(id="zero-gradient", name="zero", severity="block", saw="", means="", remedy="")
    mild = tactics.Tactic("mild")
    trials = tactics.Trial(tactics.PLAIN, plain, 32, 0.0, 1), tactics.Trial(mild, other, 32, 0.0, 1)
    (found,) = tactics.remedied([blocked], tactics.Choice(mild if other > plain else tactics.PLAIN, trials))
    assert found.severity == severity


class Bent(Guide):
    """The model's gradients where told, and others elsewhere."""

    def __init__(self, model: nn.Module, where: Tensor, scale: float) -> None:
        super().__init__(model)
        self.where, self.scale = where, scale

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        near = torch.stack([(x == row).flatten(1).all(1) for row in self.where]).any(0)
        if not x.requires_grad:
            return logits
        factor = torch.where(near, 1.0, self.scale).unsqueeze(1)
        return logits.detach() + factor * (logits - logits.detach())


@pytest.mark.parametrize(("scale", "new"), [(1.0, False), (1.0 + 1e-5, False), (1.1, True), (0.0, True)])
def test_gradients_that_differ_only_within_the_region_are_others(
    data: mohs.data.Dataset, scale: float, new: bool
) -> None:
    model, x = small(), data.x[:6]
    probe: Any = SimpleNamespace(model=model)
    known = tactics._Known(probe, x, Threat.parse("linf:0.1"), 4, exact=True)
    assert known.adds(tactics.PLAIN)
    assert known.adds(tactics.Tactic("bent", lambda m: Bent(m, x, scale))) is new
    assert tactics._Known(probe, x, Threat.parse("linf:0.1"), 4, exact=False).adds(tactics.PLAIN)


def test_where_all_gradients_are_zero_each_way_is_tried(data: mohs.data.Dataset) -> None:
    flat: Any = SimpleNamespace(model=defenses.BitDepth(1)(small()).eval())
    known = tactics._Known(flat, data.x[:6], Threat.parse("linf:0.1"), 4, exact=True)
    for name in ("one", "other"):
        assert known.adds(tactics.Tactic(name, lambda model: model))
    assert known.adds(tactics.Tactic("honest", defenses.Honest))
    assert not known.adds(tactics.Tactic("honest again", defenses.Honest))

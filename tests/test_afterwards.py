"""Checks after the plan: planted models and results trip them, healthy ones do not, and the ladder mends what it can."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from core_models import inputs, relu_net
from torch import Tensor, nn

import mohs
from mohs import defenses
from mohs.evaluation import _afterwards, _student, tactics
from mohs.evaluation._stages import Evaluation
from mohs.evaluation.checks import AFTERWARDS, _review
from mohs.evaluation.checks._seen import Seen, ok
from mohs.evaluation.plans import Plan, PlanStep
from mohs.records import Record
from mohs.threat import Access, Threat

N, SHAPE, EPS = 32, (1, 4, 4), 0.04
THREAT = f"linf:{EPS}"
SOUND = Plan(
    "sound",
    (
        PlanStep.make("APGD", {"steps": 20}),
        PlanStep.make("APGD", {"steps": 40, "objective": "margin"}, aims=2),
        PlanStep.make("Square", {"steps": 60}),
    ),
)


def short(steps: int = 15, **settings: object) -> Plan:
    return Plan("short", (PlanStep.make("PGD", {"steps": steps, **settings}),))


def data(model: nn.Module) -> tuple[Tensor, Tensor]:
    x = inputs(N, *SHAPE, seed=5)
    with torch.no_grad():
        return x, model(x).argmax(1)


class Turned(torch.autograd.Function):
    """The identity; each row's gradient is turned round where told."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sign: Tensor) -> Tensor:
        ctx.sign = sign
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.sign, None


class Trap(nn.Module):
    """Honest gradients at the data, where checks look before the run; anywhere else they point the other way."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.register_buffer("known", x.flatten(1).clone())

    def forward(self, x: Tensor) -> Tensor:
        far = torch.cdist(x.detach().flatten(1), self.known).amin(1) > 1e-3
        return Turned.apply(x, 1.0 - 2.0 * far.view(-1, 1, 1, 1).float())


def trapped() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    net = relu_net(SHAPE)
    x, y = data(net)
    return nn.Sequential(Trap(x), net).eval(), (x, y)


def found(record: Record) -> dict[str, str]:
    return {f.id: f.severity for f in record.header.checks if f.id in {*AFTERWARDS, "radii", "climbs"}}


def said(record: Record, id_: str) -> str:
    (finding,) = [f for f in record.header.checks if f.id == id_]
    return f"{finding.saw} | {finding.remedy}"


@pytest.fixture(scope="module")
def healthy() -> Record:
    net = relu_net(SHAPE)
    return mohs.evaluate(net, data(net), THREAT, plan=SOUND, stated_accuracy=1.0, control=20)


@pytest.fixture(scope="module")
def fooled() -> Record:
    """The trap, looked at and left alone."""
    model, xy = trapped()
    return mohs.evaluate(model, xy, THREAT, plan=short(), adaptive="off", control=12)


@pytest.fixture(scope="module")
def mended() -> Record:
    """The trap, and all that is done about it."""
    model, xy = trapped()
    return mohs.evaluate(model, xy, THREAT, plan=short(), claim="accuracy >= 0.5", control=12)


# ---- healthy ---------------------------------------------------------------------------------------------


def test_a_healthy_net_trips_nothing_and_is_looked_at_by_all(healthy: Record) -> None:
    severities = found(healthy)
    assert {k: v for k, v in severities.items() if v in ("warn", "block")} == {}
    assert set(severities) == {*AFTERWARDS, "radii", "climbs"}
    untested = {f.id for f in healthy.header.checks if f.id in severities and "not tested" in f.saw}
    assert untested == {"ablation", "transfer", "eight-bit", "answers-only", "trained-against"}
    assert 0.2 < healthy.robust_accuracy < 0.9, "else the checks have nothing to look at"
    assert [a.name for a in healthy.header.attacks] == [s.label for s in SOUND.steps]


# ---- planted models --------------------------------------------------------------------------------------


def test_a_trap_trips_all_that_can_see_it(healthy: Record, fooled: Record) -> None:
    before = [f.id for f in fooled.header.checks if f.severity in ("warn", "block") and f.id not in found(fooled)]
    assert before == [], "or the checks after the plan are not what finds it"
    assert fooled.robust_accuracy > healthy.robust_accuracy + 0.2
    severities = found(fooled)
    assert severities["one-step"] == severities["masking"] == severities["transfer"] == "warn"
    assert severities["answers-only"] == "warn", "labels know no gradients, and find what these hide"
    assert severities["climbs"] == "warn"
    assert severities["unbounded"] in ("warn", "block")
    assert severities["random-points"] in ("warn", "block")
    assert severities["radii"] == "info", "a larger radius helps those who do not use it no more than a smaller one"
    assert [a.name for a in fooled.header.attacks] == ["PGD-15 CE"]


def test_a_trap_is_sprung_by_the_ladder(healthy: Record, mended: Record) -> None:
    assert mended.robust_accuracy <= healthy.robust_accuracy + 1 / N
    assert mended.verdict is not None
    assert mended.verdict.word != "blocked"
    assert "Afterwards: " in said(mended, "masking")
    assert "Done: " in said(mended, "one-step")
    assert "survivors" in said(mended, "one-step")
    assert any(a.name.startswith("HopSkipJump") for a in mended.header.attacks)
    assert any(t.chosen and t.name != "gradients as they are" for t in mended.header.tactics)
    added = mended.header.plan.steps[1:]
    assert len(added) == len(mended.header.attacks) - 1 >= 4
    assert all("added after the plan because of" in s.note or "what the check" in s.note for s in added)
    assert "gradients of the model without layer 0" in "".join(s.config for s in added) or not mended.survived.any()
    assert mohs.evaluation.replay(mended, trapped()[0]).holds


def test_the_report_names_what_was_added(mended: Record, tmp_path: Path) -> None:
    page = mohs.reports.render(mended, tmp_path / "page.html").read_text()
    assert mended.header.attacks[-1].name.split(",")[0] in page
    assert "iterations beat one step" in page


def test_whom_a_check_breaks_is_broken(monkeypatch: pytest.MonkeyPatch, mended: Record) -> None:
    """Its points are in the record like those of any attack, counted once, and fool the model again."""
    monkeypatch.setattr(
        _afterwards._Ladder, "_rung", lambda self, *args, **more: ""
    )  # which finds what the looks found
    model, xy = trapped()
    record = mohs.evaluate(model, xy, THREAT, plan=short(), control=12)
    kept = [i for i, s in enumerate(record.header.plan.steps) if "what the check" in s.note]
    assert kept == list(range(1, len(record.attacks))), "after all that loud checks asked for"
    assert len(kept) > 2
    before = set(record.results(0).example[record.results(0).success].tolist())
    for index, attack in zip(record.attacks[1:], record.header.attacks[1:], strict=True):
        rows = record.results(index)
        assert attack.name.endswith(", within a check")
        assert rows.success.all()
        assert not before & set(rows.example.tolist())
        assert attack.given == attack.broke == len(rows.example)
        assert attack.alone_n is attack.alone_broke is None
        before |= set(rows.example.tolist())
    assert not record.survived[list(before)].any()
    assert mohs.evaluation.replay(record, model).holds
    (said_of,) = [f.saw for f in record.header.checks if f.id == "kept"]
    assert sum(int(word) for word in said_of.split() if word.isdigit()) == sum(
        len(record.results(i).example) for i in kept
    )
    assert record.robust_accuracy >= mended.robust_accuracy
    steps = record.header.plan.steps
    assert {s.restarts for s in steps if "more restarts" in s.note} == {2}


def test_what_a_loud_check_broke_does_not_calm_it(mended: Record) -> None:
    assert found(mended)["random-points"] == "warn"
    assert any(a.name.startswith("RandomPoints") for a in mended.header.attacks)
    assert "no longer seen" not in next(f.means for f in mended.header.checks if f.id == "random-points")


def test_an_evaluation_that_does_not_adapt_keeps_to_its_plan(fooled: Record) -> None:
    assert "a single step" in said(fooled, "one-step")
    assert len(fooled.header.plan.steps) == 1
    assert "kept" not in found(fooled)


def test_too_few_steps_are_found_and_given(healthy: Record) -> None:
    net = relu_net(SHAPE)
    plan = short(steps=4, step_size=EPS / 16, random_start=False)
    left = mohs.evaluate(net, data(net), THREAT, plan=plan, adaptive="off", control=12)
    assert found(left)["optimisation"] == "warn"
    more = mohs.evaluate(net, data(net), THREAT, plan=plan, control=12)
    assert more.robust_accuracy < left.robust_accuracy
    assert more.robust_accuracy <= healthy.robust_accuracy + 2 / N
    assert "8 steps of PGD" in said(more, "optimisation")
    assert "Afterwards: " in said(more, "optimisation")
    assert more.header.attacks[1].name.startswith("PGD-8 CE")


class Ripples(nn.Module):
    """Whether an ascent succeeds is decided by where it begins: of seven hills one is high enough."""

    def forward(self, x: Tensor) -> Tensor:
        t = (x.flatten(1)[:, 0] - 0.5) / 0.1  # -1 to 1 within the radius
        rise = torch.cos(7 * math.pi * (t - 0.42)) * torch.exp(-((t - 0.42) ** 2)) - 0.95
        return torch.stack([torch.zeros_like(rise), rise], 1) + 0 * x.flatten(1).sum(1, keepdim=True)


def ripples() -> tuple[Tensor, Tensor, Plan]:
    """Inputs, labels and an attack that breaks those whose random start was lucky."""
    x = torch.full((N, 1, 1, 2), 0.5)
    x[:, 0, 0, 1] = torch.linspace(0, 1, N)
    plan = Plan("one", (PlanStep.make("PGD", {"steps": 12, "step_size": 0.004, "objective": "margin"}),))
    return x, torch.zeros(N, dtype=torch.int64), plan


def test_luck_is_found_by_further_restarts() -> None:
    x, y, plan = ripples()
    once = mohs.evaluate(Ripples().eval(), (x, y), "linf:0.1", plan=plan, adaptive="off", control=12)
    assert 0.3 < once.robust_accuracy < 0.98
    assert found(once)["restarts"] == "warn"
    more = mohs.evaluate(Ripples().eval(), (x, y), "linf:0.1", plan=plan, control=12)
    assert more.robust_accuracy < once.robust_accuracy - 0.2
    assert any("because of: restarts" in step.note for step in more.header.plan.steps)
    if found(more)["restarts"] != "warn":  # calm only where luck has nothing left to find
        left = torch.from_numpy(more.survived)
        (step,) = plan.steps
        attack = step.build_for(Threat.parse("linf:0.1"))
        again = mohs.attack(attack, Ripples().eval(), x[left], y[left], "linf:0.1", restarts=20, seed=77)
        assert int(again.success.sum()) <= 0.1 * N
        assert "further restarts" in next(f.means for f in more.header.checks if f.id == "restarts")


def test_only_what_answers_a_check_calms_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    loud = Seen("warn", "first")
    checks = {id_: ("name", lambda review: ok("second") if review.thorough else loud) for id_ in AFTERWARDS}
    monkeypatch.setattr(_afterwards, "AFTERWARDS", checks)
    monkeypatch.setattr(_afterwards, "SUSPICIONS", ())
    monkeypatch.setattr(
        _afterwards._Ladder, "more", lambda self, id_, times: ran.append(id_) or self.run.steps.append(None)
    )
    monkeypatch.setattr(_afterwards._Ladder, "sound", lambda self, id_: ran.append(id_) or id_)
    monkeypatch.setattr(
        _afterwards, "Review", lambda run, upto, thorough=False: SimpleNamespace(thorough=thorough, closed="", finds=[])
    )
    monkeypatch.setattr(_afterwards, "_finding", lambda id_, name, seen, done: (id_, seen))
    plan = SimpleNamespace(steps=[])
    run = SimpleNamespace(
        planned=0, steps=[], kept=set(), notify=lambda *a: None, settings=SimpleNamespace(adaptive="declared"),
        choice=tactics.Choice(tactics.PLAIN),
        run=SimpleNamespace(header=SimpleNamespace(plan=SimpleNamespace(steps=[], model_copy=lambda update: plan))),
    )  # fmt: skip
    seen = dict(_afterwards.review(run))
    assert ran == ["optimisation", "restarts", "step-size"]
    assert [seen[id_].severity for id_ in ran] == ["info"] * 3
    assert len({seen[id_].means for id_ in ran}) == 3


def test_what_follows_the_plan_draws_other_starts_than_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: set[int] = set()
    checked: set[int] = set()
    made = Evaluation.job

    class Looked(_review.Job):
        def __init__(self, *args: Any, seed: int, **settings: Any) -> None:
            checked.add(seed)
            super().__init__(*args, seed=seed, **settings)

    monkeypatch.setattr(_review, "Job", Looked)

    def job(self: Evaluation, attack: Any, todo: Tensor, **settings: Any) -> Any:
        if "start" in settings:  # of a step, not of a check
            seeds.add(settings["seed"])
        return made(self, attack, todo, **settings)

    monkeypatch.setattr(Evaluation, "job", job)
    x, y, plan = ripples()
    record = mohs.evaluate(Ripples().eval(), (x, y), "linf:0.1", plan=plan, control=12)
    ran = [s for s in record.header.plan.steps if "what the check" not in s.note]
    assert len(seeds) == len(ran) > 1
    assert len(checked) > 1, "the checks try other starts too"
    assert seeds & checked == {0}, "where a check looks at what the plan's attack does"
    assert not (seeds | checked) & set(range(1, 1000)), "a user may take these for a run of its own"


def test_the_model_without_a_declared_defense_is_attacked_too() -> None:
    net = relu_net(SHAPE)
    model = defenses.BitDepth(5)(net).eval()
    record = mohs.evaluate(model, data(model), THREAT, plan=SOUND, control=12)
    assert "without BitDepth(bits=5)" in said(record, "ablation")
    assert found(record)["transfer"] == "ok"
    assert "survivors nearest to breaking" in said(record, "transfer")


def test_a_student_learns_the_answers_and_repeats_itself() -> None:
    net = relu_net(SHAPE)
    x, y = data(net)
    state = torch.random.get_rng_state()
    one, two = (_student.student(net, x, Threat.parse(THREAT), 0, 16) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert float((one(x).argmax(1) == y).float().mean()) > 0.7
    assert torch.equal(one(x), two(x))


def test_a_student_asks_in_batches_of_one_shape() -> None:
    net, shapes = relu_net(SHAPE), set()
    handle = net.register_forward_hook(lambda _, inputs, __: shapes.add(len(inputs[0])))
    _student.student(net, inputs(10, *SHAPE), Threat.parse(THREAT), 0, 16)  # 40 inputs
    handle.remove()
    assert shapes == {16}


# ---- where nothing may be looked at -------------------------------------------------------------------------


def test_a_limit_of_queries_closes_the_model() -> None:
    net = relu_net(SHAPE)
    threat = Threat(mohs.Linf(EPS), access=Access.SCORE, queries=50)
    record = mohs.evaluate(net, data(net), threat, plan=Plan("s", (PlanStep.make("Square", {"steps": 20}),)), control=0)
    assert {f.severity for f in record.header.checks if f.id in AFTERWARDS} <= {"ok", "info"}
    assert "limits the queries" in said(record, "unbounded")
    assert len(record.header.attacks) == 1


@pytest.mark.parametrize("threat", ["l2:0.2", "l1:0.8", "l0:2"])
def test_other_regions_are_served(threat: str) -> None:
    net = relu_net(SHAPE)
    record = mohs.evaluate(net, data(net), threat, plan="quick", control=12)
    loud = {f.id: f.saw for f in record.header.checks if f.severity in ("warn", "block")}
    assert loud == {}
    assert found(record)["unbounded"] == "ok"


def test_random_models_are_not_judged_by_luck() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = relu_net(SHAPE)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x + 0.02 * torch.randn_like(x))

    net = relu_net(SHAPE)
    x, y = data(net)
    record = mohs.evaluate(Noisy().eval(), (x[:16], y[:16]), THREAT, plan=short(8))
    loud = {f.id for f in record.header.checks if f.severity in ("warn", "block")}
    assert loud <= {"randomness", "rescored"}


def test_what_follows_the_plan_runs_on_the_control_subset_too_where_a_second_look_compares(mended: Record) -> None:
    control = set(np.flatnonzero(mended.correct & mended.examples.control).tolist())
    assert len(mended.header.attacks) > 4
    for index in mended.attacks:
        if "what the check" not in mended.header.plan.steps[index].note:
            assert control <= set(mended.results(index).example.tolist())
    # on survivors alone, no attack without gradients broke what those with gradients left: the look would always be calm
    assert f"of {len(control)} examples" in said(mended, "masking").split("Afterwards: ")[1]


def test_a_run_that_is_killed_on_the_ladder_ends_as_one_that_was_not(mended: Record, tmp_path: Path) -> None:
    model, xy = trapped()
    seen: list[str] = []

    def stop(stage: str, done: int, total: int, broken: int) -> None:
        seen.append(stage)
        if stage.startswith("8/8") and done == 0:
            raise KeyboardInterrupt

    run: dict[str, Any] = {"plan": short(), "claim": "accuracy >= 0.5", "control": 12, "out": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        mohs.evaluate(model, xy, THREAT, notify=stop, **run)
    assert Record.load(tmp_path / "run").header.status == "interrupted"
    again = mohs.evaluate(model, xy, THREAT, **run)
    assert again.header.ledger_digest == mended.header.ledger_digest
    assert again.header.checks == mended.header.checks
    assert again.header.plan == mended.header.plan
    assert np.array_equal(again.survived, mended.survived)


def test_more_of_the_same_costs_no_more_than_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """However loudly a check asks, the rungs of more steps and restarts take at most a quarter of the plan's passes each."""
    images = mohs.data.load("bundled:fashion-mnist", n=128)
    net = mohs.models.load("bundled:fashion-pgd")
    loud = Seen("warn", "planted", "", "")
    for id_ in ("optimisation", "restarts"):
        monkeypatch.setitem(AFTERWARDS, id_, ("planted", lambda _: loud))
    record = mohs.evaluate(net, images, "linf:0.1", plan=short(10), control=0)
    passes = [int((r.forwards + r.backwards).sum()) for r in map(record.results, record.attacks)]
    added = [
        i
        for i, s in enumerate(record.header.plan.steps)
        if "because of: restarts" in s.note or "optimisation" in s.note
    ]
    planned = sum(passes[: added[0]])
    assert len(added) == 4
    floor = 2 * 128 // 64  # rows that every step takes, whatever they cost
    for i in added:
        step = record.header.plan.steps[i]
        each = passes[i] / len(record.results(i).example)
        assert passes[i] <= planned / 4 + (floor + 1) * each, step.config

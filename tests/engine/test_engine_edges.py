"""The engine on odd subjects: what it blocks, refuses and skips, and that it leaves everything as it was."""

from __future__ import annotations

import copy
import gc
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine_problem import THREAT, Head, N, by_content, conv, evaluate, header_facts, images, rows_of
from torch import Tensor, nn

import mohs
from mohs.certificates import CROWN, IBP
from mohs.data import Dataset
from mohs.errors import DataError, ModelError, ThreatError, UsageError
from mohs.evaluation import Plan, PlanStep, engine, replay
from mohs.evaluation.plans import ALL_CLASSES
from mohs.models import weights_hash
from mohs.regions import Linf
from mohs.threat import Access, Threat

# ---- blocked, refused, skipped ---------------------------------------------------------------------------


class Noted(nn.Module):
    """The small net behind a layer that a mode or a last activation can spoil."""

    def __init__(self, before: nn.Module | None = None, after: nn.Module | None = None) -> None:
        super().__init__()
        self.before, self.net, self.after = before or nn.Identity(), conv(), after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


def test_training_mode_blocks_and_is_left_as_it_is(tmp_path: Path) -> None:
    model = Noted(before=nn.BatchNorm2d(1)).eval()
    model.before.train()
    before, modes = weights_hash(model), [m.training for m in model.modules()]
    record = evaluate(images().take(16), model, claim="accuracy >= 0.1", out=tmp_path / "run", certificates=[IBP()])
    assert record.verdict is not None
    assert (record.verdict.word, record.verdict.exit_code) == ("blocked", 12)
    assert record.attacks == []
    assert record.certified is None
    assert [f.id for f in record.header.checks if f.severity == "block"] == ["training-mode", "batch-coupling"] or [
        f.id for f in record.header.checks if f.severity == "block"
    ] == ["training-mode"]
    assert "nothing is known about robustness" in record.describe()
    assert weights_hash(model) == before
    assert [m.training for m in model.modules()] == modes
    # and so the same command finds its own record again
    again = evaluate(images().take(16), model, claim="accuracy >= 0.1", out=tmp_path / "run", certificates=[IBP()])
    assert header_facts(again.dir) == header_facts(record.dir)


def test_softmax_output_only_warns() -> None:
    record = evaluate(images().take(16), Noted(after=nn.Softmax(1)).eval(), claim="accuracy >= 0.9")
    assert "output-type" in [f.id for f in record.header.checks if f.severity == "warn"]
    assert record.verdict is not None
    assert record.verdict.word == "refuted"
    assert record.attacks == [0, 1, 2]


def test_infinite_radius_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ThreatError, match=r"needs a finite radius; got l2:inf.*mohs.attack"):
        evaluate(threat="l2:inf", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_step_that_cannot_run_is_said_in_the_limits() -> None:
    plan = Plan("with a skip", (PlanStep.make("FGSM"), PlanStep.make("DeepFool", skip={"l0": "it needs a norm"})))
    record = evaluate(images().take(8), threat="l0:2", plan=plan)
    assert [a.name for a in record.header.attacks] == ["FGSM CE"]
    assert record.header.limits == ["DeepFool-50: DeepFool does not serve l0: it needs a norm"]
    assert evaluate(images().take(8), plan=plan).header.limits == []


class Fussy(nn.Module):
    """A model with a fault."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.net, self.fault = conv(), fault

    def forward(self, x: Tensor) -> Any:
        z = self.net(x)
        if self.fault == "raises":
            raise RuntimeError("no such layer")
        if self.fault == "gradient" and x.requires_grad:
            raise RuntimeError("no way back")
        return {"shape": z[:, None], "none": None, "short": z[:1], "few": z[:, :3]}.get(self.fault, z)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raises", r"raised RuntimeError on an input of shape .*no such layer"),
        ("gradient", r"raised RuntimeError on an input of shape .*no way back"),
        ("shape", r"answered with shape \(16, 1, 10\) to 16 inputs.*Allowed: \[N, K\]"),
        ("none", r"answered with a NoneType"),
        ("short", r"answered with shape \(1, 10\) to 16 inputs"),
        ("few", r"has 3 classes, but labels reach 9 \(rows .*Allowed: 0 to 2"),
    ],
)
def test_faulty_model_is_refused_before_anything_is_written(fault: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"(?s){said}"):
        evaluate(model=Fussy(fault).eval(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_settings_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(DataError, match=r"Inputs must lie in the box \[0.2, 0.8\] of the threat; rows 0, 1"):
        evaluate(threat="linf:0.05 in [0.2, 0.8]", out=out)
    with pytest.raises(UsageError, match=r"stated_accuracy must lie between 0 and 1; got 1.5"):
        evaluate(stated_accuracy=1.5, out=out)
    with pytest.raises(UsageError, match=r"batch must be a whole number >= 1"):
        evaluate(batch=0, out=out)
    with pytest.raises(ThreatError, match=r"IBP covers balls of a norm; got the threat l0:3"):
        evaluate(threat="l0:3", plan=Plan("f", (PlanStep.make("FGSM"),)), certificates=[IBP()], out=out)
    assert not out.exists()


def test_what_a_step_refuses_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "run"
    boundless = replace(Threat.parse("l0:3"), box=(-math.inf, math.inf))
    with pytest.raises(ThreatError, match=r"L0 allows any value inside the box"):
        evaluate(threat=boundless, plan=Plan("f", (PlanStep.make("FGSM"),)), out=out)
    assert not out.exists()


def test_nothing_is_upheld_where_no_attack_could_run(tmp_path: Path) -> None:
    data = images().take(N).take(indices=np.flatnonzero(conv()(images().x[:N]).argmax(1) == images().y[:N]).tolist())
    blind = replace(Threat.parse(THREAT), access=Access.LABEL)
    record = evaluate(data, threat=blind, claim="accuracy >= 0.3")
    assert record.attacks == []
    assert record.verdict is not None
    assert (record.verdict.word, record.verdict.exit_code) == ("undecided", 11)
    assert "no attack of the plan could run" in record.verdict.sentence
    assert "FGSM needs access GRADIENT; the threat grants LABEL" in record.verdict.sentence
    assert len(record.header.limits) == 3
    # but a proof needs no attack, and wrong answers refute without one
    proven = evaluate(data, threat=replace(blind, region=Linf(1e-4)), claim="accuracy >= 0.3", certificates=[IBP()])
    assert proven.verdict is not None
    assert proven.verdict.word == "certified"
    x, y = data
    assert evaluate(Dataset(x, (y + 1) % 10), threat=blind, claim="accuracy >= 0.3").verdict.word == "refuted"
    with pytest.raises(ThreatError, match=r"A claim was given with access NONE"):
        evaluate(data, threat=replace(blind, access=Access.NONE), claim="accuracy >= 0.3", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Counting(nn.Module):
    """Writes a buffer in its forward, from some call on."""

    def __init__(self, after: int) -> None:
        super().__init__()
        # what a plain attribute says is part of the model's identity; what another object holds is not
        self.net, self.limit, self.calls = conv(), SimpleNamespace(after=after), 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > self.limit.after:
            self.seen += 1
        return self.net(x)


@pytest.mark.parametrize("after", [0, 40])
def test_a_model_that_changes_is_blocked_and_put_back(after: int, tmp_path: Path) -> None:
    model, data = Counting(after).eval(), images().take(16)
    before = weights_hash(model)
    record = evaluate(data, model, claim="accuracy >= 0.1", out=tmp_path / "run")
    assert record.verdict is not None
    assert record.verdict.word == "blocked"
    assert "the model changes while it is looked at" in record.verdict.sentence
    assert record.attacks == ([] if after == 0 else [0, 1, 2])
    assert weights_hash(model) == before
    # the same directory again, even if nothing changes now: its rows were made on another model
    again = evaluate(data, model, claim="accuracy >= 0.1", out=tmp_path / "run")
    assert again.verdict == record.verdict
    model.limit.after = 10**9
    if after:
        assert evaluate(data, model, claim="accuracy >= 0.1", out=tmp_path / "run").verdict.word == "blocked"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "got a NoneType"),
        ("mnist", "got a str"),
        (torch.rand(2, 1, 7, 7), r"got a tensor of shape \(2, 1, 7, 7\)"),
        (torch.utils.data.Subset([(0, 1)], [0]), "got a Subset"),
        ((1, 2, 3), "got a tuple"),
    ],
)
def test_other_forms_of_data_are_refused(data: Any, said: str) -> None:
    for call in (mohs.evaluate, mohs.check):
        with pytest.raises(DataError, match=rf"{said}.*a pair of tensors \(x, y\).*mohs.data.load"):
            call(conv(), data, THREAT)


def test_pairs_of_any_shape_and_precision() -> None:
    x, y = images().take(6)
    net = nn.Sequential(nn.Unflatten(1, (1, 7)), conv()).eval()
    three = evaluate((x[:, 0], y), net)
    assert three.header.data.shape == [7, 7]
    assert three.attacks
    double = evaluate([x.double(), y], copy.deepcopy(conv()).double())  # type: ignore[arg-type]
    assert double.points(double.attacks[0])[1].dtype == np.float64
    assert double.header.data.hash != three.header.data.hash
    assert np.array_equal(double.survived, evaluate((x, y)).survived)


def test_copies_are_said(tmp_path: Path) -> None:
    data = images().take(5)
    record = evaluate(data.take(indices=[i % 5 for i in range(20)]), plan=Plan("f", (PlanStep.make("FGSM"),)))
    (found,) = (f for f in record.header.checks if f.id == "distinct")
    assert (found.severity, found.saw) == ("warn", "n = 20, but only 5 distinct examples")
    assert "independent" in found.means


# ---- small and odd problems ------------------------------------------------------------------------------


def test_without_a_directory_the_record_lives_as_long_as_it_is_held() -> None:
    record = evaluate(images().take(4))
    place = record.dir
    record.verify()
    assert place.is_dir()
    del record
    gc.collect()
    assert not place.exists()


def test_failing_without_a_directory_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.tempfile, "tempdir", str(tmp_path))

    def stop(stage: str, done: int, total: int, broken: int) -> None:
        if stage.startswith("2/3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(images().take(4), notify=stop)
    assert list(tmp_path.iterdir()) == []


def test_one_example() -> None:
    right = int(np.flatnonzero(conv()(images().x[:20]).argmax(1).numpy() == images().y[:20].numpy())[0])
    record = evaluate(images().take(1, right), claim="accuracy >= 0.5", certificates=[CROWN()])
    assert record.n == 1
    assert record.verdict is not None
    assert record.verdict.word == "undecided"
    assert record.verdict.exit_code == 11


def test_no_right_answer_at_all() -> None:
    x, _ = images().take(20)
    record = evaluate(Dataset(x, (conv()(x).argmax(1) + 1) % 10), claim="accuracy >= 0.5", certificates=[IBP()])
    assert (record.correct.sum(), record.survived.sum(), record.certified_accuracy) == (0, 0, 0.0)
    assert record.attacks == []
    assert [p.survived for p in record.header.curve] == [0]
    assert record.verdict is not None
    assert record.verdict.word == "refuted"


def test_one_logit_and_two_logits_agree() -> None:
    data = images(2).take(24)
    pair, flat, column = (
        evaluate(data, model, threat="linf:0.2") for model in (conv(2), Head(conv(2), True), Head(conv(2), False))
    )
    assert 0 < pair.survived.sum() < pair.correct.sum()
    assert by_content([flat]) == by_content([column])
    assert flat.header.subject.classes == 2
    assert np.array_equal(pair.correct, flat.correct)
    assert (pair.survived != flat.survived).sum() <= 1


@pytest.mark.parametrize("aims", [9, ALL_CLASSES])
def test_more_aims_than_classes(aims: int) -> None:
    plan = Plan("aims", (PlanStep.make("PGD", {"steps": 4}, aims=aims),))
    two, ten = evaluate(images(2).take(8), conv(2), plan=plan), evaluate(images().take(8), plan=plan)
    assert (two.header.plan.steps[0].targets, ten.header.plan.steps[0].targets) == (1, 9)
    assert two.results(0).restart.max() <= 0
    assert ten.results(0).forwards.max() > 9


def test_nothing_outside_is_touched() -> None:
    model = copy.deepcopy(conv())
    for p in model.parameters():
        p.requires_grad_(True)
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), weights_hash(model))  # noqa: NPY002
    evaluate(images().take(8), model, certificates=[CROWN()])
    after = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), weights_hash(model))  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_inside_inference_mode() -> None:
    outside = evaluate(images().take(6))
    with torch.inference_mode():
        inside = evaluate(Dataset(images().x[:6].clone(), images().y[:6].clone()))
    assert rows_of(inside) == rows_of(outside)


class Poisoned(nn.Module):
    """Answers NaN to bright inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv()

    def forward(self, x: Tensor) -> Tensor:
        bright = x.flatten(1).mean(1, keepdim=True) > 0.3
        return self.net(x).masked_fill(bright, float("nan"))


def test_nan_answers_end_in_a_record_that_can_be_read() -> None:
    record = evaluate(images().take(24), Poisoned().eval(), claim="accuracy >= 0.5")
    nan = np.isnan(record.examples.clean_margin)
    assert 0 < nan.sum() < 24
    # one of them has label 0, which argmax would call right
    assert 0 in record.examples.label[nan]
    assert not record.correct[nan].any()
    assert set(record.examples.clean_label[nan].tolist()) == {-1}


class Wavering(nn.Module):
    """The small net with noise on its logits."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.net, self.noise = conv(), noise

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return z + self.noise * torch.randn_like(z)


def test_replay_of_a_random_model_asks_the_draws_that_confirmed_it() -> None:
    threat = replace(Threat.parse("linf:0.2"), draws=15)
    record = evaluate(images().take(24), Wavering(0.3).eval(), threat=threat, adaptive="declared")
    assert not [f for f in record.header.checks if f.severity == "block"]
    state = torch.get_rng_state()
    first, second = replay(record, Wavering(0.3).eval()), replay(record, Wavering(0.3).eval())
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert first.points > 10
    assert first.holds

"""The exam: does an attack find changes that are known to be there? Only then does finding none say something."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from mohs import streams
from mohs.attacks import Attack
from mohs.attacks._batches import usual_batch
from mohs.attacks._inputs import check_inputs, check_mode
from mohs.data import Dataset
from mohs.errors import ThreatError, UsageError
from mohs.evaluation._given import dataset
from mohs.evaluation._needle import Hider, Untestable, last_linear
from mohs.evaluation._quiet import untouched
from mohs.evaluation._sitting import GuideFactory, Progress, Room, Sitting
from mohs.evaluation.plans import Plan, PlanStep, load_plan
from mohs.records.schema import Finding
from mohs.records.stats import clopper_pearson
from mohs.regions import Lp
from mohs.target import classify
from mohs.threat import Threat

PASS = 0.95
"""Share of the needles that must be found."""
EASY = 0.1
"""Share of the needles above which a search at random finds so many that the exam says little about an attack."""
HARDER = (1, 4)
"""Multiples of the inner points, tried in turn while the exam is too easy."""


@dataclass(frozen=True)
class Exam:
    """What came of an exam.

    Args:
        subject: the plan's name, or the attack.
        threat: in its short form.
        layer: the linear layer whose input are the features; None: there is none, and the logits are.
        dimension: of the features.
        inner: inner points per example in the end.
        looks: random looks per example.
        asked: examples that were to be tested.
        examples: their positions in the data [tested], without the untestable ones.
        success: was the needle found [tested]?
        lucky: did a random look find it [tested]?
        untestable: reasons, each with how many examples it struck.
        spent: forwards and backwards of the attacks.
        notes: what limits the result.
    """

    subject: str
    threat: str
    layer: str | None
    dimension: int
    inner: int
    looks: int
    asked: int
    examples: Tensor
    success: Tensor
    lucky: Tensor
    untestable: dict[str, int] = field(default_factory=dict)
    spent: int = 0
    notes: tuple[str, ...] = ()

    @property
    def tested(self) -> int:
        """Examples near which a needle was hidden."""
        return len(self.success)

    @property
    def found(self) -> int:
        """Needles found."""
        return int(self.success.sum())

    @property
    def rate(self) -> float:
        """Share of the needles that the attack found; nan without any."""
        return self.found / self.tested if self.tested else math.nan

    @property
    def random_rate(self) -> float:
        """Share of the needles that random looks found; nan without any."""
        return int(self.lucky.sum()) / self.tested if self.tested else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Exact 95% bounds (Clopper, Pearson) on the share that would be found of all needles like these."""
        return clopper_pearson(self.found, self.tested)

    @property
    def easy(self) -> bool:
        """Do random looks find so many needles that the exam says little?"""
        return self.random_rate > EASY

    @property
    def passed(self) -> bool:
        """At least 95% found, in an exam that at least half of the examples allowed and that was not too easy."""
        return bool(self.rate >= PASS) and 2 * self.tested >= self.asked and not self.easy

    @property
    def finding(self) -> Finding:
        """The result as a finding of the doctor."""
        low, high = self.interval
        saw = f"{self.subject} found {self.found} of {self.tested} planted adversarial points"
        if self.tested:
            saw += f" ({self.rate:.0%}; 95% interval {low:.0%} to {high:.0%}); {self.looks} random looks found {int(self.lucky.sum())}"
        saw = ". ".join([saw, *self._struck(), *self.notes]) + "."
        name = "exam of the attack"
        if self.passed:
            means = "The attack finds changes that are known to be there, on this model's own features: finding none says something."
            return Finding(id="exam", name=name, severity="ok", saw=saw, means=means)
        if self.rate >= PASS and self.easy:
            means = "Random looks find these points too, so passing says little about the attack."
            remedy = (
                f"Raise inner (now {self.inner}), or give reach=0.95; where that was given, the model's gradients led to no higher "
                "point than the random one: give a guide (mohs.gradients)."
            )
        elif 2 * self.tested < self.asked:
            means = "On most examples no point could be planted, so the attack is not examined."
            remedy = "Raise n, examine at another radius, or lower inner; compare the attack with others by hand."
        else:
            means = "The attack misses changes that are known to be there, so that finding none elsewhere says little."
            remedy = "Give more steps or restarts, a larger plan, or a guide (mohs.gradients) past layers that hide gradients."
        return Finding(id="exam", name=name, severity="warn", saw=saw, means=means, remedy=remedy)

    def _struck(self) -> list[str]:
        return [f"Not testable, {count} of {self.asked}: {reason}" for reason, count in self.untestable.items()]

    def __repr__(self) -> str:
        word = "passed" if self.passed else "not passed"
        return f"Exam({word}: {self.subject} found {self.found} of {self.tested}, random looks {int(self.lucky.sum())})"


@torch.inference_mode(False)  # evaluation code often stands inside inference_mode, which knows no gradients
def exam(
    model: nn.Module,
    data: Dataset | tuple[Tensor, Tensor],
    threat: Threat | str,
    plan: Plan | str | Path | Attack = "standard",
    n: int = 64,
    seed: int = 0,
    *,
    inner: int = 999,
    reach: float | None = 0.95,
    looks: int = 200,
    guide: GuideFactory | None = None,
    average: int | None = None,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Exam:
    """Hide an adversarial point near each of n examples, and see whether the attack finds it.

    An attack that finds nothing on a model is evidence only if it would have found something. So the model's last linear
    layer gives way, one example at a time, to one that calls a planted point of the region adversarial and everything well
    inside it not. All that may hide gradients before that layer stays in place, and so does the logits' scale; the attack
    runs unchanged. Use it before believing that a model is robust. It cannot see what a defense does after its last linear
    layer, and passing is necessary, not sufficient: the planted point is easier to find than some others.

    For each example: ``inner`` points, the example itself and uniform ones within 0.95 of the radius, are class 0; one random
    point at the full radius (a corner of the cube; else of the sphere) is class 1. An unregularised logistic regression on
    the features tells them apart,

        s(x) = <w, f(x)> - t,   t = s_inner + 0.999 (s_point - s_inner),   s_inner = max of the inner points

    and its logits are scaled to the range of the model's own. As the highest s of the whole region is often several times
    s_point, a single gradient step can pass. So a search of 50 steps from the planted point follows, and where it gets to
    s_best > s_point, t rises to at least s_inner + reach (s_best - s_inner).

    Args:
        model: a classifier in eval mode, inputs in the box to logits.
        data: a ``Dataset`` or a pair (x, y); examples that the model gets wrong are passed over.
        threat: such as ``"linf:8/255"``: a finite radius above 0, any norm, so neither l0 nor patch nor words.
        plan: a ``Plan``, its name or file, or one attack such as ``mohs.attacks.PGD(steps=40)``. Each stage of a plan runs
            on all that are not yet broken, as in an evaluation's control subset; its ``share`` is not applied.
        n: examples, chosen by a keyed hash of their content.
        seed: of all draws; the global generators are not touched.
        inner: inner points per example; raised fourfold where random looks find more than 10% of the points.
        reach: how near the best known score the attack must come, above 0 and below 1; None: only the planted point's, as in
            the paper.
        looks: random points per example, half of them at the full radius.
        guide: makes the attack's guide from the exam's classifier, whose modules have the names they have in ``model``, such
            as ``lambda m: mohs.gradients.Through(m, {"0": None})`` or ``mohs.defenses.Honest``.
        average: evaluations of a random model per look, as for ``mohs.attack``.
        batch: physical batch size of the inner points.
        progress: called with (stage, examples done, of how many).

    Returns:
        An ``Exam``: ``rate``, ``passed``, ``interval``, ``random_rate``, ``untestable``, ``finding`` and more.

    Raises:
        ThreatError: an infinite or zero radius, l0, patch, words, or no attack of the plan can run under the threat.
        UsageError, DataError, ModelError, AccessError: see the message.

    Cost: per example inner + looks + 3 forwards, 50 forwards and backwards, a logistic regression (milliseconds at a hundred
    features, a second at thousands), and the attack on a batch of its own rows.

    >>> import mohs
    >>> net = mohs.models.load("bundled:fashion-pgd")
    >>> test = mohs.data.load("bundled:fashion-mnist", n=8)
    >>> exam(net, test, "linf:0.1", mohs.attacks.APGD(steps=25), n=4).passed
    True
    >>> exam(net, test, "linf:0.1", mohs.attacks.PGD(steps=5, step_size=0.001), n=4).passed
    False

    **Differs from the paper**: ``reach`` (with ``reach=None`` it is the paper's exam); the threshold is measured from the
    highest inner point instead of the regression's own boundary; norms other than l2 and linf, and random models: there the
    lower quartile of several looks at the planted point counts.
    **Source**: R. Zimmermann, W. Brendel, F. Tramer, N. Carlini, "Increasing confidence in adversarial robustness
    evaluations", NeurIPS 2022, section 4 (the binarization test).
    """
    threat = Threat.parse(threat)
    _refuse(threat, n, inner, reach, looks)
    data = dataset(data)
    check_mode(model)
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), data.x.device)
    x, y = ((t.clone() if t.is_inference() else t).to(device) for t in data)
    check_inputs(x, y, threat, batch=batch)
    batch = batch or usual_batch(x)
    steps, subject, notes = _stages(plan, threat)
    chosen = _right(model, x, y, n, seed, batch)
    layer = None
    if len(chosen):
        with untouched(model, seed):
            layer = last_linear(model, x[chosen[:1]].expand(batch, *x.shape[1:]))
    for harder in HARDER:
        hider = Hider(model, layer, threat, inner * harder, reach, looks, seed, batch, guide, average)
        rooms, reasons = _hidden(hider, x, chosen, progress)
        if sum(r.hidden.lucky for r in rooms) <= EASY * len(rooms):
            break
    sitting = Sitting(threat, rooms, guide, average, seed, progress)
    for step in steps:
        sitting.stage(*step)
    dimension = rooms[0].hidden.dimension if rooms else 0
    if layer is None and rooms:
        notes.append(
            "The model has no nn.Linear that is called with one row per input, so its logits served as features"
        )
    if 0 < dimension <= hider.inner:
        notes.append(
            f"The features have {dimension} dimensions, fewer than the {hider.inner + 1} points that are told apart"
        )
    if harder > 1:
        notes.append(
            f"Random looks found more than {EASY:.0%} of the points, so the inner points were raised to {hider.inner}"
        )
    if len(chosen) < n:
        notes.append(f"The data have {len(chosen)} examples that the model gets right; {n} were asked for")
    return Exam(
        subject=subject, threat=str(threat), layer=layer, dimension=dimension, inner=hider.inner, looks=looks,
        asked=len(chosen), examples=torch.tensor([r.example for r in rooms], dtype=torch.int64),
        success=torch.tensor([r.broken for r in rooms], dtype=torch.bool),
        lucky=torch.tensor([r.hidden.lucky for r in rooms], dtype=torch.bool),
        untestable=dict(Counter(reasons)), spent=sitting.spent, notes=tuple(notes),
    )  # fmt: skip


def _refuse(threat: Threat, n: int, inner: int, reach: float | None, looks: int) -> None:
    if not isinstance(threat.region, Lp):
        raise ThreatError(
            f"The exam needs a norm; got {threat}. Few changed positions or words, or a patch, leave no room between inner points and "
            "the boundary. "
            "Allowed: linf, l2, l1 and other p >= 1."
        )
    if threat.minimum or threat.region.eps == 0:
        raise ThreatError(
            f"The exam hides a point at the full radius; got {threat}. Give a finite radius above 0, such as "
            f"'{threat.region.name}:0.1'."
        )
    for name, value, least in (("n", n, 1), ("inner", inner, 2), ("looks", looks, 2)):
        if type(value) is not int or value < least:
            raise UsageError(f"{name} must be a whole number >= {least}; got {value!r}.")
    if reach is not None and (not isinstance(reach, int | float) or not 0 < reach < 1):
        raise UsageError(f"reach must lie strictly between 0 and 1, or be None; got {reach!r}. Usual is 0.95.")


def _stages(plan: Plan | str | Path | Attack, threat: Threat) -> tuple[list[tuple[PlanStep, Attack]], str, list[str]]:
    """(step, attack) pairs, what the exam examines, and what of it cannot run."""
    if isinstance(plan, Attack) and not isinstance(plan, type | Plan):
        return [(PlanStep(type(plan).__name__), plan)], repr(plan), []
    if not isinstance(plan, Plan | str | Path):
        raise UsageError(
            f"plan must be a plan, its name or file, or an attack such as mohs.attacks.PGD(steps=40); got {plan!r}."
        )
    plan = load_plan(plan)
    steps = [(step, built) for step in plan.steps if (built := step.build_for(threat)) is not None]
    skipped = plan.skipped(threat)
    if not steps:
        raise ThreatError(
            f"No attack of the plan {plan.name!r} can run under {threat}: {'; '.join(skipped) or 'all are meant for other regions'}. "
            "Choose another plan or grant more access."
        )
    return steps, f"the plan {plan.name!r}", [f"Not run: {reason}" for reason in skipped]


def _right(model: nn.Module, x: Tensor, y: Tensor, n: int, seed: int, batch: int) -> Tensor:
    """The first n examples, in the order of a keyed hash, that the model gets right."""
    keys = streams.derive(streams.content_keys(x), seed, streams.text_key("exam order"))
    order, chosen = keys.argsort(stable=True), x.new_zeros(0, dtype=torch.int64)
    for part in order.split(batch):
        index = part[torch.arange(batch, device=x.device).clamp_max(len(part) - 1)]
        with untouched(model, seed), torch.no_grad():
            answer = classify(model, x[index]).argmax(1)[: len(part)]
        chosen = torch.cat([chosen, part[answer == y[part]]])[:n]
        if len(chosen) == n:
            break
    return chosen


def _hidden(
    hider: Hider, x: Tensor, chosen: Tensor, progress: Progress | None
) -> tuple[list[Room], list[str]]:  # fmt: skip
    rooms, reasons = [], []
    for done, example in enumerate(chosen.tolist()):
        try:
            hidden = hider.hide(x[example : example + 1])
            rooms.append(Room(example, hidden, hidden.x))
        except Untestable as reason:
            reasons.append(str(reason))
        if progress is not None:
            progress("hiding", done + 1, len(chosen))
    return rooms, reasons

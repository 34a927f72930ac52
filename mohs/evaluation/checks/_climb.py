"""Checks after the plan of what attacks climb: does it rise, does it mean success, and had it stopped rising?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mohs.attacks import Stop
from mohs.evaluation.checks._obstacles import closed, stepless, uncertain, unless, unsighted
from mohs.evaluation.checks._review import Review
from mohs.evaluation.checks._seen import Seen, ok, untested
from mohs.objectives import Objective, dlr, margin, probability_margin
from mohs.problem import Goal

SIZES = (0.25, 4.0)
"""Step sizes that are tried, in units of the attack's own."""
MOVED = 0.05
"""Share of the whole way of the margin, from the clean input to the best point: less is no matter."""
STUCK = 0.5
"""Share of the traces that may never rise above their first look."""
SIGNED = (margin, dlr, probability_margin)
"""Objectives that are above 0 exactly where the goal is met."""
AGAINST = 0.05
"""Share of the examples along whose path objective and margin may go against each other (one example at least)."""
UNSETTLED = 0.01
"""Share of the survivors whose attack may end by its budget without a word."""


@unless(closed, uncertain, stepless)
def step_size(review: Review) -> Seen:
    """Do steps of a quarter or four times the size change anything? No pass where attacks set their steps themselves; else at most
    a hundredth of the plan's passes, or 6 rows."""
    assert review.strongest is not None
    attack = review.strongest[1]
    name = type(attack).__name__
    if not _has(attack, "step_size"):
        return ok(f"{name}, the strongest of the plan, sets its steps by itself")
    if not hasattr(attack, "own_step"):
        return untested(f"the steps of {name}, the strongest of the plan, have no one length")
    if not review.alive.any():
        return ok("there are no survivors")
    own = attack.own_step(review.threat)
    rows = review.near(review.afford(2 * len(SIZES) * attack.steps, most=16))
    before = torch.from_numpy(review.best[rows.cpu().numpy()])
    start = -torch.from_numpy(review.record.examples.clean_margin[rows.cpu().numpy()])
    said, most, gained = [], 0, 0.0
    for factor in SIZES:
        found = review.tried(replace(attack, step_size=own * factor), rows)
        after = found.margin.double().cpu()
        way = (torch.maximum(after, before) - start).clamp_min(1e-12)
        new, moved = int(found.success.sum()), float(((after - before).clamp_min(0) / way).median())
        said.append(
            f"steps {factor:g} times as long break {new} of {len(rows)} survivors and add {moved:.1%} to the way"
        )
        most, gained = max(most, new), max(gained, moved)
    saw = f"{name} with a step of {own:.3g}: {'; '.join(said)} (median of the margin; threshold {MOVED:.0%})"
    if most < 2 and gained <= MOVED:
        return ok(saw)
    return Seen(
        "warn", saw,
        "The step size is badly chosen: too long a step leaps over what it looks for, too short a one does not arrive. The "
        "survivors say less than they seem to.",
        "Take APGD, which sets its steps by itself, or the step size that found more.",
    )  # fmt: skip


def climbs(traces: Sequence[tuple[int, int, int, NDArray[Any]]]) -> Seen:
    """Does the objective rise? No pass: of the loss curves, (attack, example, restart, objective at each look)."""
    paths = [values[np.isfinite(values)] for *_, values in traces]
    paths = [v for v in paths if len(v) > 2]
    if not paths:
        return untested("there are no loss curves")
    stuck = sum(bool(v[1:].max() <= v[0]) for v in paths)
    falls = float(np.mean([np.mean(np.diff(v) < 0) for v in paths]))
    third = [max(len(v) // 3, 1) for v in paths]
    idle = sum(bool(v[-t:].mean() <= v[:t].mean()) for v, t in zip(paths, third, strict=True))
    saw = (
        f"{stuck} of {len(paths)} loss curves never rise above their first look (threshold {STUCK:.0%}); {falls:.0%} of the "
        f"steps go down, and {idle} curves end no higher than they began"
    )
    flat = sum(bool((v == v[0]).all()) for v in paths)
    if stuck > STUCK * len(paths) and flat < len(paths):
        return Seen(
            "warn", saw,
            "What is to be climbed falls: the gradient points elsewhere than up, or the steps are too long. Such an attack finds "
            "nothing, whatever its budget.",
            "Look at the gradients (mohs.gradients) and at the step size; APGD sets its own.",
        )  # fmt: skip
    if falls > 0.5 and idle > STUCK * len(paths):
        return Seen(
            "warn", saw, "More steps go down than up, and nothing is gained by the end: the steps leap over what they look for.",
            "Take shorter steps, or APGD, which sets its own.",
        )  # fmt: skip
    return ok(saw)


class Watched(Objective):
    """An objective that notes its value and the margin at each look; its repr is the objective's, and so are the random streams."""

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective.function)
        self.objective, self.values, self.margins = objective, list[Tensor](), list[Tensor]()

    def __call__(self, logits: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
        """(value [B], cotangent [B, K]), as the objective has them."""
        value, cotangent = self.objective(logits, goal)
        self.values.append(value.detach().double().cpu())
        self.margins.append(goal.margin(logits).detach().double().cpu())
        return value, cotangent


@unless(unsighted)
def means_success(review: Review) -> Seen:
    """Does a higher objective mean a larger margin, along the way of an attack? No pass where some attack climbs an objective that
    is above 0 exactly where the goal is met; else the path of one, on 6 to 16 examples."""
    climbed = {a: getattr(review.steps[a][1], "objective", margin) for a in review.sighted}
    signed = [a for a, objective in climbed.items() if objective in SIGNED]
    if signed:
        names = ", ".join(dict.fromkeys(type(review.steps[a][1]).__name__ for a in signed))
        return ok(
            f"{len(signed)} of {len(climbed)} attacks with gradients ({names}) climb what is above 0 only for a success"
        )
    able = [a for a in climbed if isinstance(climbed[a], Objective) and _has(review.steps[a][1], "objective")]
    if reason := closed(review) or uncertain(review):
        return untested(reason)
    if not able:
        return untested("no objective can be watched")
    attack: Any = review.steps[able[-1]][1]
    objective = climbed[able[-1]]
    rows = review.near(min(review.afford(2 * attack.steps, most=16), review.run.batch), review.record.correct)
    if not len(rows):
        return ok("no example is right")
    watched = Watched(objective)
    review.tried(replace(attack, objective=watched), rows, stop=Stop.BUDGET)
    values, margins = (torch.stack(seen)[:, : len(rows)].numpy() for seen in (watched.values, watched.margins))
    agree = np.array([_ranked(v, m) for v, m in zip(values.T, margins.T, strict=True)])
    against, n = int((agree < 0).sum()), int(np.isfinite(agree).sum())
    if not n:
        return untested(f"{objective!r} did not change on the way")
    saw = (
        f"along the way of {type(attack).__name__}, {objective!r} and the margin go against each other for {against} of {n} "
        f"examples (rank correlation below 0; median {np.nanmedian(agree):.2f}; threshold {AGAINST:.0%})"
    )
    if against <= max(AGAINST * n, 1):
        return ok(saw)
    return Seen(
        "warn", saw,
        "What the attack climbs is not success: it rises while the answer gets safer. That it finds nothing says nothing.",
        'Climb the margin (objective = "margin"), or the margin of probabilities, as the built-in plans do.',
    )  # fmt: skip


def settled(review: Review) -> Seen:
    """Had the attacks on the survivors come to an end, or did their budget end them? No pass."""
    alive = np.flatnonzero(review.alive)
    if not len(alive):
        return ok("there are no survivors")
    best, gained, times = (
        -review.record.examples.clean_margin,
        np.zeros(review.record.n),
        np.zeros(review.record.n, int),
    )
    start = best.copy()
    for index in review.attacks:
        rows = review.record.results(index)
        better = np.fmax(best[rows.example], rows.margin)
        gained[rows.example], best[rows.example] = better - best[rows.example], better
        times[rows.example] += 1
    way = np.maximum(best - start, 1e-12)
    rising = alive[(times[alive] > 1) & (gained[alive] > MOVED * way[alive])]
    once = int((times[alive] == 1).sum())
    saw = (
        f"of {len(alive)} survivors, {len(rising)} gained more than {MOVED:.0%} of the way of their margin from the last attack on "
        f"them, and {once} had one attack only, as others were nearer to breaking"
    )
    if len(rising) + once <= UNSETTLED * len(alive):
        return ok(saw)
    who = ", ".join(str(i) for i in review.record.examples.id[rising][:8]) + (", ..." if len(rising) > 8 else "")
    return Seen(
        "info", saw + (f" (gaining: {who})" if len(rising) else ""),
        "Their attacks ended by the plan's budget and not because nothing more was to be gained. They count as survived.",
        "A larger plan gives them more: 'thorough' gives most attacks to all survivors.",
    )  # fmt: skip


def _ranked(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Spearman's rank correlation; nan where one of both is constant or not finite."""
    finite = np.isfinite(a) & np.isfinite(b)
    ranks = []
    for values in (a[finite], b[finite]):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count + 1) / 2)[place])  # ties share the mean of their ranks
    if finite.sum() < 3 or min(r.std() for r in ranks) == 0:
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _has(attack: Any, field: str) -> bool:
    return is_dataclass(attack) and field in {f.name for f in fields(attack)}

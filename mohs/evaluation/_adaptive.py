"""What an evaluation does about the model under it: look, find gradients that work, and examine the plan that used them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mohs import defenses, records
from mohs.errors import ThreatError
from mohs.evaluation import tactics
from mohs.evaluation._afterwards import of_curves
from mohs.evaluation._quiet import untouched
from mohs.evaluation.checks import Probe, examine, usable
from mohs.evaluation.exam import exam
from mohs.models import BlackBox
from mohs.threat import Access

if TYPE_CHECKING:
    from mohs.evaluation._stages import Evaluation

SUSPECT = ("no-gradient", "zero-gradient", "gradient-promise", "output-type", "randomness")
"""Checks that ask for another way to get gradients, or for fresh draws."""


def look(run: Evaluation, stated_accuracy: float | None) -> None:
    """Take the sample that all checks share; a random model is scored on fresh draws where the threat does not say how many."""
    said = defenses.declared(run.model)
    if said.unit and run.threat.box != (0.0, 1.0):
        raise ThreatError(
            f"The defenses of this model ({', '.join(map(repr, said.defenses))}) need inputs in [0, 1]; the threat's box is "
            f"{run.threat.box}. Scale the inputs to [0, 1], and let the model scale them back."
        )
    if run.settings.exam and run.settings.reject is not None:
        raise ThreatError(
            "The exam needs a model that answers with classes alone, and this one may reject. Leave the exam out."
        )
    usable(run.model, run.x, run.y, stated_accuracy, run.batch)
    run.probe = Probe(run.model, run.x, run.y, run.threat, stated_accuracy, run.seed, run.batch, run.settings.reject)
    training = any(m.training for m in run.model.modules())  # a check blocks that, and mends it to look further
    if run.settings.adaptive == "off" or _paid(run) or training or run.threat.draws or run.threat.access == Access.NONE:
        return
    if run.probe.random:
        run.threat = run.probe.threat = replace(run.threat, draws=tactics.DRAWS)


def _paid(run: Evaluation) -> bool:
    """Does each look at the model have its price?"""
    return any(isinstance(m, BlackBox) for m in run.model.modules())


def findings(run: Evaluation) -> list[records.Finding]:
    """What the checks see, and what was done about it: the tactic that guides the attacks is chosen here."""
    with untouched(run.model, run.seed):
        seen = examine(run.probe)
        if run.settings.adaptive == "off" or run.threat.access < Access.GRADIENT or not run.steps or _paid(run):
            return seen
        believe = run.settings.adaptive == "declared"
        run.choice = tactics.choose(run.probe, seen, run.threat, run.seed, run.batch, believe=believe)
        run.guide = run.choice.tactic.guide(run.model)
        return tactics.remedied(seen, run.choice)


def naive(run: Evaluation, findings: Sequence[records.Finding]) -> str:
    """Why attacks that were told not to adapt uphold nothing; '' where they adapted, or had nothing to adapt to."""
    if run.settings.adaptive != "off":
        return ""
    declared = ", ".join(type(d).__name__ for d in defenses.declared(run.model).defenses)
    suspect = [f.name for f in findings if f.id in SUSPECT and f.severity in ("warn", "block")]
    return "; ".join([f"the model declares {declared}"] * bool(declared) + [f"not quiet: {n}" for n in suspect])


def exam_of_plan(run: Evaluation) -> list[records.Finding]:
    """Are the curves sound, and would this plan find what is there, with the gradients it had?"""
    drawn = of_curves(run.run.record())
    if not run.settings.exam or not run.steps:
        return drawn
    tactic = run.choice.tactic

    def tell(stage: str, done: int, total: int) -> None:
        run.notify(f"exam, {stage}", done, total, 0)

    result = exam(
        run.model, (run.x, run.y), run.threat, run.plan, run.settings.exam, run.seed, guide=tactic.make,
        average=tactic.average, batch=run.batch, progress=tell,
    )  # fmt: skip
    return [*drawn, result.finding]

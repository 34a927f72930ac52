"""What an evaluation does about the model under it: look, find gradients that work, and examine the plan that used them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mohs import defenses, records
from mohs.errors import ThreatError
from mohs.evaluation import tactics
from mohs.evaluation._quiet import untouched
from mohs.evaluation.checks import Probe, examine, usable
from mohs.evaluation.exam import exam
from mohs.models import BlackBox
from mohs.threat import Access

if TYPE_CHECKING:
    from mohs.evaluation.engine import _Evaluation


def look(run: _Evaluation, stated_accuracy: float | None) -> None:
    """Take the sample that all checks share; a random model is scored on fresh draws where the threat does not say how many."""
    said = defenses.declared(run.model)
    if said.rejects:
        raise ThreatError(
            f"{said.defenses[0]!r} may reject an input, and an evaluation does not know yet that to be rejected is no success for "
            "the attacker. Use mohs.attack(..., reject=K), where K is the logit of the rejection."
        )
    if said.unit and run.threat.box != (0.0, 1.0):
        raise ThreatError(
            f"The defenses of this model ({', '.join(map(repr, said.defenses))}) need inputs in [0, 1]; the threat's box is "
            f"{run.threat.box}. Scale the inputs to [0, 1], and let the model scale them back."
        )
    usable(run.model, run.x, run.y, stated_accuracy, run.batch)
    run.probe = Probe(run.model, run.x, run.y, run.threat, stated_accuracy, run.seed, run.batch)
    training = any(m.training for m in run.model.modules())  # a check blocks that, and mends it to look further
    if run.adaptive == "off" or _paid(run) or training or run.threat.draws or run.threat.access == Access.NONE:
        return
    if run.probe.random:
        run.threat = run.probe.threat = replace(run.threat, draws=tactics.DRAWS)


def _paid(run: _Evaluation) -> bool:
    """Does each look at the model have its price?"""
    return any(isinstance(m, BlackBox) for m in run.model.modules())


def findings(run: _Evaluation) -> list[records.Finding]:
    """What the checks see, and what was done about it: the tactic that guides the attacks is chosen here."""
    with untouched(run.model, run.seed):
        seen = examine(run.probe)
        if run.adaptive == "off" or run.threat.access < Access.GRADIENT or not run.steps or _paid(run):
            return seen
        believe = run.adaptive == "declared"
        run.choice = tactics.choose(run.probe, seen, run.threat, run.seed, run.batch, believe=believe)
        run.guide = run.choice.tactic.guide(run.model)
        return tactics.remedied(seen, run.choice)


def exam_of_plan(run: _Evaluation) -> list[records.Finding]:
    """Would this plan find what is there, with the gradients it had?"""
    if not run.needles or not run.steps:
        return []
    tactic = run.choice.tactic

    def tell(stage: str, done: int, total: int) -> None:
        run.notify(f"exam, {stage}", done, total, 0)

    result = exam(
        run.model, (run.x, run.y), run.threat, run.plan, run.needles, run.seed, guide=tactic.make,
        average=tactic.average, batch=run.batch, progress=tell,
    )  # fmt: skip
    return [result.finding]

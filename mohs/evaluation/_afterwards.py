"""After the plan: what its own record says of it, and the ladder of further attacks that are run where it says too little."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mohs import records
from mohs.attacks import APGD, FGSM, PGD, SPGD, HotFlip, LaVAN
from mohs.attacks.run import refused_norm
from mohs.errors import FAILURES, RecordError, gist
from mohs.evaluation import tactics
from mohs.evaluation._header import aims
from mohs.evaluation._random_points import RandomPoints
from mohs.evaluation._student import student
from mohs.evaluation.checks import AFTERWARDS, CLIMBS, CURVE, Finding
from mohs.evaluation.checks._answers import SEARCH
from mohs.evaluation.checks._climb import climbs
from mohs.evaluation.checks._review import Find, Review, by_scores
from mohs.evaluation.checks._seen import Seen
from mohs.evaluation.checks._validity import radii
from mohs.evaluation.plans import PlanStep
from mohs.objectives import margin
from mohs.regions import L0, Patch, Words
from mohs.threat import Access

if TYPE_CHECKING:
    from mohs.evaluation._stages import Evaluation

SECOND = "other gradients on the survivors"
"""What an attack is called in the findings that takes the gradients left over for them."""
KEPT = "what the checks broke"
"""What it is called in the findings where checks broke survivors."""
SHARE = 0.125
"""Share of the survivors that a further attack takes first; it goes on while it breaks some (``_order.WORTH``)."""
DOUBLINGS = 2
"""How often more steps or restarts are given."""
SUSPICIONS = ("one-step", "masking", "random-points", "unbounded", "transfer", "answers-only")
"""Checks that say: the gradients of the plan hide something."""
NOT_ENOUGH = {"optimisation": "steps", "restarts": "restarts"}
"""Checks that say: more of the same would find more."""
ANSWERED = {
    "optimisation": "The plan's attacks had not come to their end; beyond the further steps that were given, more of them add nothing.",
    "restarts": "Luck decided what the plan's attacks found; beyond the further restarts that were given, more of them break nothing.",
    "step-size": "The plan's steps were of a bad size; an attack that sets its own was run, of which this is no longer seen.",
}
"""What it means that a check is calm after that was run which answers its own complaint. Nothing else calms these."""


def review(run: Evaluation) -> list[Finding]:
    """Look at the record of the plan; where that finds fault, climb the ladder, and say what came of it.

    All of it is a function of the plan's rows and of seeds, so that a killed run that is resumed decides the same.
    """
    run.notify("checks after the plan", 0, 1, 0)
    looked = Review(run, run.planned)
    seen: dict[str, Seen] = {}
    looked.seen = seen
    ladder = None if run.settings.adaptive == "off" or looked.closed else _Ladder(run, looked)

    def look(id_: str, at: Review) -> Seen:
        saw = _looked(AFTERWARDS[id_][1], at)
        if ladder is not None:
            ladder.finds += [(id_, find) for find in at.finds]
        at.finds.clear()
        return saw

    def again(id_: str) -> None:
        if ladder is not None and ladder.climbed and seen[id_].severity in ("warn", "block"):
            seen[id_] = _second(id_, seen[id_], look(id_, _so_far(run, seen)))

    for id_ in AFTERWARDS:
        seen[id_] = look(id_, looked)
    done: dict[str, list[str]] = {}
    others = ""
    if ladder is not None:
        others = ladder.second(run.choice)
        for id_ in NOT_ENOUGH:
            for times in range(1, DOUBLINGS + 1):
                if seen[id_].severity != "warn":
                    break
                done.setdefault(id_, []).append(ladder.more(id_, times))
                again(id_)
        if seen["step-size"].severity == "warn":
            done["step-size"] = [ladder.sound("step-size")]
            again("step-size")
        for id_ in SUSPICIONS:  # what only lacked steps is no suspicion
            again(id_)
        loud = [id_ for id_ in SUSPICIONS if seen[id_].severity in ("warn", "block")]
        if loud:
            done[loud[0]] = ladder.suspicion(loud)
            done.update({id_: [f"Done: see '{AFTERWARDS[loud[0]][0]}'."] for id_ in loud[1:]})
            for id_ in loud:
                later = look(id_, _so_far(run, seen))
                untested = later.saw.startswith("not tested")
                calmer = (
                    "warn"
                    if seen[id_].severity == "block" and later.severity != "block" and not untested
                    else seen[id_].severity
                )
                seen[id_] = replace(seen[id_], severity=calmer, saw=f"{_first(seen[id_])}. Afterwards: {later.saw}")
        for id_ in NOT_ENOUGH if loud else ():
            again(id_)
        ladder.keep()
    run.notify("checks after the plan", 1, 1, 0)
    found = [_finding(id_, AFTERWARDS[id_][0], seen[id_], done.get(id_, [])) for id_ in AFTERWARDS]
    if others:
        found.append(_finding("second-gradients", SECOND, Seen("info", others), []))
    if ladder is not None and ladder.kept:
        found.append(_finding("kept", KEPT, Seen("info", ladder.told()), []))
    return found


def of_curves(record: records.Record) -> list[Finding]:
    """What the loss curves and the curve of accuracy against radius say."""
    return [
        _finding("climbs", CLIMBS, climbs(record.traces()), []),
        _finding("radii", CURVE, radii(record.header.curve), []),
    ]


def _looked(function: Callable[[Review], Seen], looked: Review) -> Seen:
    try:
        return function(looked)
    except RecordError:
        raise
    except FAILURES as error:  # not every model can be taken apart, and a run of hours must not end in a check
        return Seen("info", f"not tested: {gist(error)}")


def _second(id_: str, before: Seen, after: Seen) -> Seen:
    """What a loud check says once that was run which answers it, and it has looked again. This look has ten times the passes: where
    the first one was loud on a few, that a second one is calm on a few others would be no news."""
    saw = f"{_first(before)}. Afterwards: {after.saw}"
    if after.saw.startswith("not tested"):
        return replace(before, saw=saw)
    if after.severity in ("warn", "block"):
        return replace(after, saw=saw)
    calm = "The plan's attacks fell short; with the further ones that were run, this is no longer seen."
    return Seen("info", saw, ANSWERED.get(id_, calm))


def _so_far(run: Evaluation, seen: dict[str, Seen]) -> Review:
    """The rows of all that has run, and what the checks saw."""
    looked = Review(run, len(run.steps), thorough=True)
    looked.seen = seen
    return looked


def _first(seen: Seen) -> str:
    return seen.saw.split(". Afterwards: ")[0]


def _finding(id_: str, name: str, seen: Seen, done: list[str]) -> Finding:
    remedy = " ".join([*done, seen.remedy]).strip()
    return Finding(id=id_, name=name, severity=seen.severity, saw=seen.saw, means=seen.means, remedy=remedy)


class _Ladder:
    """Runs further attacks on the survivors, as steps that follow those of the plan."""

    def __init__(self, run: Evaluation, looked: Review) -> None:
        self.run, self.looked = run, looked
        self.base = run.run.header.plan.model_copy(update={"steps": run.run.header.plan.steps[: len(run.steps)]})
        self.added: list[records.Step] = []
        self.finds: list[tuple[str, Find]] = []
        self.kept: dict[str, int] = {}

    @property
    def climbed(self) -> bool:
        """Has a further attack run?"""
        return len(self.run.steps) > self.run.planned

    def keep(self) -> None:
        """Whom a check broke on its way is broken: written down as a step of its own, so that the record shows the points.

        Last of all: a check that was loud must look again at the examples that made it so.
        """
        run = self.run
        for id_, find in self.finds:
            alive = torch.from_numpy(Review(run, len(run.steps)).alive).to(find.rows.device)
            new = find.found.success & alive[find.rows]
            if not bool(new.any()):
                continue
            step = _step(find.attack, find.restarts, 1.0, f"what the check '{AFTERWARDS[id_][0]}' broke")
            index = self._add(replace(step, aims=find.aims), find.attack)
            run.kept.add(index)
            answered = torch.from_numpy(run.run.ledger.answered(index)).to(find.rows)
            new &= ~torch.isin(find.rows, answered)  # by an earlier sitting
            if bool(new.any()):
                run.write(index, find.rows[new], find.found.of(new), alive.cpu().numpy())
            broke = int(run.run.record().results(index).success.sum())
            if broke:  # fresh draws may refute all of a random model
                self.kept[id_] = self.kept.get(id_, 0) + broke

    def told(self) -> str:
        """Whom the checks broke."""
        parts = [f"{count} by '{AFTERWARDS[id_][0]}'" for id_, count in self.kept.items()]
        return f"of the survivors of the attacks, the looks of the checks broke {', '.join(parts)}; the record has their points"

    def _add(self, step: PlanStep, attack: Any, note: str = "", like: PlanStep | None = None) -> int:
        """One more step in plan and record; its place."""
        if like is not None:
            step = replace(step, aims=like.aims, rank=like.rank, start=like.start)
        self.run.steps.append((step, attack))
        self.added.append(
            records.Step(
                name=step.name, config=repr(attack) + note, restarts=step.restarts, targets=aims(step, self.run.classes) or None,
                rank=step.rank, start=step.start, share=step.share, note=step.note,
            )
        )  # fmt: skip
        self.run.run.update(plan=self.base.model_copy(update={"steps": [*self.base.steps, *self.added]}))
        return len(self.run.steps) - 1

    def more(self, what: str, times: int) -> str:
        """More steps, or more restarts, of the strongest attack."""
        assert self.looked.strongest is not None
        index, attack = self.looked.strongest
        like, tries = self.run.steps[index][0], 1
        if what == "optimisation":
            attack = self.looked.longer(2**times)
        else:
            tries = 5**times
        # all rungs of this kind together cost no more than the plan, unless they go on because they break many
        each = 2 * attack.steps * like.restarts * tries * max(self.looked.manner["aims"], 1)
        able = self.looked.spent / (DOUBLINGS * len(NOT_ENOUGH) * each * max(self._left(), 1))
        return self._rung(attack, what, share=min(SHARE, able), restarts=like.restarts * tries, like=like)

    def sound(self, reason: str) -> str:
        """An attack whose steps set themselves."""
        return self._rung(_sound(self.run), reason, share=SHARE)

    def second(self, choice: tactics.Choice) -> str:
        """One more attack, with the gradients that a choice left for those whom the plan does not break."""
        if choice.second is None:
            return ""
        note = f", gradients {choice.second.name}"
        said = self._rung(_sound(self.run), "other gradients", share=SHARE, note=note, tactic=choice.second)
        if said:
            self.run.run.update(tactics=tactics.noted(choice, second=True))
        return said

    def suspicion(self, loud: list[str]) -> list[str]:
        """Other gradients, then none, then those of other nets."""
        run = self.run
        said, reason = [], ", ".join(loud)
        white = run.threat.access >= Access.GRADIENT
        if "one-step" in loud:
            said.append(self._rung(FGSM(), reason))
        if "random-points" in loud:
            said.append(self._rung(RandomPoints(), reason))
        if white:  # the plan's own may be set badly
            said.append(self.sound(reason))
        if white and not run.choice.trials:
            said.append(self._gradients(reason))
        search = by_scores(run.threat, 500)
        if run.threat.access >= Access.SCORE and not refused_norm(search, run.threat):
            said.append(self._rung(search, reason, share=SHARE))
        if "answers-only" in loud:  # the dearest, and only where it has shown that it breaks some
            said.append(self._rung(SEARCH, reason, share=SHARE))
        said.append(self._transfer(reason, white))
        return [text for text in said if text]

    def _gradients(self, reason: str) -> str:
        """Try tactics on the plan's own sample, and attack again with the best; it also guides what follows."""
        run = self.run
        believe = run.settings.adaptive == "declared"
        choice = tactics.choose(run.probe, [], run.threat, run.seed, run.batch, believe=believe, suspicious=True)
        run.choice, run.guide = choice, choice.tactic.guide(run.model)
        run.run.update(tactics=tactics.noted(choice))
        if choice.tactic.make is None and choice.tactic.average is None:
            said = f"Tried: {len(choice.trials) - 1} other ways to get gradients; none was worth more."
        else:
            said = self._rung(_sound(run), reason, share=SHARE, note=f", gradients {choice.tactic.name}")
        return " ".join(text for text in (said, self.second(choice)) if text)

    def _transfer(self, reason: str, white: bool) -> str:
        """With the gradients of the model without its defense, or of a student where there is none."""
        run, looked = self.run, self.looked
        if not self._left():
            return ""
        try:
            inner = looked.inner if white else None
            guide, name = inner or (
                student(run.model, run.x[: run.seen.stop], run.threat, run.seed, run.batch),
                "a student of the model",
            )
        except FAILURES as error:
            return f"Not tried: transfer ({gist(error)})."
        name = name if inner is None else f"the model without {name}"
        own = isinstance(run.threat.region, Patch | Words)
        attack = _sound(run) if white or own else PGD(steps=50, objective=margin)  # others ask for logits
        return self._rung(attack, reason, share=SHARE, guide=guide, note=f", gradients of {name}")

    def _left(self) -> int:
        return int(Review(self.run, len(self.run.steps)).alive.sum())

    def _rung(
        self, attack: Any, reason: str, share: float = 1.0, restarts: int = 1, guide: nn.Module | None = None, note: str = "",
        like: PlanStep | None = None, tactic: tactics.Tactic | None = None,
    ) -> str:  # fmt: skip
        """One further attack on the survivors, with aims and start like those of a step, and other gradients where a guide or a
        tactic is given; answers what it broke."""
        run, before = self.run, self._left()
        if not before:
            return ""
        index = self._add(
            _step(attack, restarts, share, f"added after the plan because of: {reason}"), attack, note, like
        )
        step, kept = run.steps[index][0], (run.choice, run.guide)
        if tactic is not None:
            run.choice, run.guide = tactics.Choice(tactic), tactic.guide(run.model)
        elif guide is not None:
            run.guide = guide
        stopped = ""
        try:
            run.attack(index, step, attack, run.seen)
        except RecordError:
            raise
        except FAILURES as error:  # what the plan found stands without it
            stopped = f" It then stopped: {gist(error)}."
        finally:
            run.choice, run.guide = kept
        return f"Done: {step.label}{note} broke {before - self._left()} of {before} survivors.{stopped}"


def _sound(run: Evaluation) -> Any:
    """An attack whose steps set themselves, for the region at hand."""
    if isinstance(run.threat.region, Patch):
        return LaVAN(steps=50)
    if isinstance(run.threat.region, Words):
        return HotFlip(steps=100)
    return SPGD(steps=50) if isinstance(run.threat.region, L0) else APGD(steps=50)


def _step(attack: Any, restarts: int, share: float, note: str) -> PlanStep:
    parts = fields(attack) if is_dataclass(attack) else ()
    values = [(f.name, getattr(attack, f.name)) for f in parts]
    named = tuple((name, repr(value) if callable(value) else value) for name, value in values)
    return PlanStep(type(attack).__name__, named, restarts, share=share, note=note)

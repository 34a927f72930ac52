"""The stages of an evaluation: clean answers, attacks, certificates, each noted in the ledger before the next begins."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mohs import records, streams
from mohs.attacks import Job, Outcome, by_distance, by_logit
from mohs.attacks._batches import fitting_batch
from mohs.attacks.run import AVERAGE
from mohs.data import Dataset
from mohs.errors import ModelError, rows_text
from mohs.evaluation import _adaptive, _afterwards, _header, _scoring, claims, tactics
from mohs.evaluation._batches import padded
from mohs.evaluation._bookmark import Bookmark
from mohs.evaluation._curves import loss_curves, radius_curve
from mohs.evaluation._order import WORTH, portions, survivors
from mohs.evaluation._others import nearest_others
from mohs.evaluation._quiet import untouched
from mohs.evaluation._rejection import rejection
from mohs.evaluation.checks import Probe
from mohs.evaluation.plans import Plan, PlanStep
from mohs.models import weights_hash
from mohs.models.code import code_parts, hash_of_parts
from mohs.problem import Goal
from mohs.target import classify
from mohs.threat import Threat

CONTROL = 100
"""Size of the control subset: every attack runs on all of it, so that their strengths can be compared."""
REJECTED = "Survived includes inputs that were right and are rejected once changed."
"""What a verdict on a model that rejects has to say."""
Notify = Callable[[str, int, int, int], None]
"""Called with (stage, examples done, of how many, of these broken)."""


@dataclass(frozen=True)
class Settings:
    """What the results depend on beside model, data, threat, plan and certificates; see ``mohs.evaluate``."""

    seed: int
    batch: int
    control: int
    adaptive: Literal["declared", "blind", "off"] = "declared"
    exam: int = 0
    until: Literal["end", "decided"] = "end"
    reject: int | None = None


class Evaluation:
    """One evaluation in its stages; each stage asks the ledger what is missing and does only that."""

    def __init__(
        self, model: nn.Module, data: Dataset, x: Tensor, y: Tensor, threat: Threat, plan: Plan,
        claim: claims.Claim | None, certificates: list[Any], settings: Settings, notify: Notify | None,
    ) -> None:  # fmt: skip
        self.model, self.data, self.x, self.y = model, data, x, y
        self.threat, self.plan, self.claim, self.certificates = threat, plan, claim, certificates
        self.seed, self.batch = settings.seed, settings.batch
        self.notify: Notify = notify or (lambda stage, done, total, broken: None)
        self.weights = weights_hash(model)  # before anything runs
        code = code_parts(model)
        with torch.no_grad():
            self.logits = classify(model, padded(x[:1], self.batch)).shape[1] if len(x) else 0
        self.code = hash_of_parts(code, code_parts(model))
        self.settings = settings = replace(settings, reject=rejection(model, self.logits, settings.reject))
        self.classes = self.logits - (settings.reject is not None)
        high = (y >= max(self.classes, 1)).nonzero().flatten().tolist()
        if high:
            raise ModelError(
                f"The model has {self.classes} classes, but labels reach {int(y.max())} ({rows_text(high)}). Allowed: "
                f"0 to {self.classes - 1}. Check that model and data belong together."
            )
        self.choice = tactics.Choice(tactics.PLAIN)
        self.guide: nn.Module | None = None
        self.probe: Probe
        self.seen = range(0)
        """The examples that have been through the plan."""
        self.steps = [(s, built) for s in plan.steps if (built := s.build_for(threat, self.rejects)) is not None]
        self.planned = len(self.steps)
        self.kept: set[int] = set()
        """Steps that no attack ran: what a check broke on its way."""

    @property
    def rejects(self) -> bool:
        """May the model reject an input?"""
        return self.settings.reject is not None

    def _skipped(self) -> list[str]:
        return self.plan.skipped(self.threat, self.rejects)

    # ---- what is about to run ---------------------------------------------------------------------------

    def identity(self, out: str | Path) -> str:
        """Of a look at sealed examples: the same attempt in the same place."""
        return _header.identity(self, place=str(Path(out).absolute()))

    def header(
        self, stated_accuracy: float | None, subject: str, command: str, sealed: records.Sealed | None = None
    ) -> records.Header:
        """Everything known before the first attack."""
        return _header.of_run(self, stated_accuracy=stated_accuracy, subject=subject, command=command, sealed=sealed)

    # ---- the stages -------------------------------------------------------------------------------------

    def check(self) -> list[records.Finding]:
        """What would make the evaluation worthless; also, can the certificates say anything about this net and threat?"""
        self.notify("checks", 0, 1, 0)
        findings = _adaptive.findings(self)
        findings += self._changed()
        if not any(f.severity == "block" for f in findings):
            if len(self.x):  # a region that needs a finite box says so here
                eps = self.x.new_full((1,), self.threat.region.eps)
                self.threat.region.extreme(torch.ones_like(self.x[:1]), self.x[:1], eps, self.threat.box)
            for step, attack in self.steps:
                self.job(attack, torch.zeros(1, dtype=torch.int64, device=self.x.device), **self.settings_of(step))
            for certificate in self.certificates:
                self._proof(certificate, slice(0, 1))
        self.notify("checks", 1, 1, 0)
        return findings

    def go(self, run: records.Run, header: records.Header, findings: list[records.Finding]) -> None:
        """All stages in order."""
        self.run, self.bookmark = run, Bookmark(run)
        if run.header.status == "complete":  # a check that blocked it may have been mended
            run.adopt(header)
        # rows of an earlier sitting in which the model changed stay worthless
        findings = findings + [f for f in run.header.checks if f.id == _header.CHANGED.id and f not in findings]
        # a verdict of an earlier sitting may speak of another claim
        run.update(checks=findings, tactics=tactics.noted(self.choice), claim=header.claim, verdict=None)
        blocked = any(f.severity == "block" for f in findings)
        for block in self._blocks():
            self._clean(block)
            self.seen = range(block.stop)
            if not blocked:
                for index, (step, attack) in enumerate(self.steps):
                    self.attack(index, step, attack, block)
                for certificate in self.certificates:
                    self._certify(certificate, block)
            if blocked or self._decided(block):
                break
        if not blocked:
            findings = findings + _afterwards.review(self)
            loss_curves(self)
            if not run.header.curve:
                run.update(curve=radius_curve(self))
                self.bookmark.drop()
            _scoring.score(self)
            run.ledger.drop_nearest()
            findings = findings + _adaptive.exam_of_plan(self) + self._changed()
        record = run.record()
        run.finish(
            limits=list(dict.fromkeys([*self._skipped(), *run.header.limits, *self._notes(record, findings)])),
            checks=findings,
            attacks=_header.attacks(record, self.steps, run.ledger.seconds(), self.kept),
            certificates=_header.certificates(record), verdict=self._verdict(record, findings),
        )  # fmt: skip

    def judge(self, run: records.Run, sealed: records.Sealed | None = None) -> None:
        """Of a complete run: check that its rows are those it ended with, and give the verdict on another claim."""
        record = run.record()
        record.verify()
        claim = _header.claimed(self.claim)
        if sealed is not None and sealed != run.header.sealed:  # made before from the same examples, without the seal
            run.update(sealed=sealed)
        if claim != run.header.claim:
            run.update(claim=claim, verdict=self._verdict(record, run.header.checks))

    def _verdict(self, record: records.Record, findings: Sequence[records.Finding]) -> records.Verdict | None:
        if self.claim is None or len(record.contradicted):
            return None
        given = claims.of_record(
            self.claim, record, blocked=[f.name for f in findings if f.severity == "block"],
            untried=() if self.steps else self._skipped(),
            warned=[f.name for f in findings if f.severity == "warn"], naive=_adaptive.naive(self, findings),
            stopped=self.settings.until == "decided", total=len(self.data),
        )  # fmt: skip
        if self.settings.reject is None:
            return given
        return given.model_copy(update={"sentence": f"{given.sentence} {REJECTED}"})

    def _blocks(self) -> list[range]:
        """The examples in the portions in which they go through the whole plan."""
        n = len(self.x)
        if self.settings.until == "end":
            return [range(n)]
        ends = [min(self.batch, n)]
        while ends[-1] < n:
            ends.append(min(2 * ends[-1], n))
        return [range(start, end) for start, end in zip([0, *ends], ends)]

    def _decided(self, block: range) -> bool:
        """Is the claim decided by what the plan found in the examples up to the end of the block?

        Written down at once: further attacks follow the plan, and what they find must not open another block later.
        """
        if self.settings.until == "end":
            return False
        header = self.run.header
        if header.ended_at is None and len(self.run.ledger.examples()) == block.stop:
            verdict = self._verdict(self.run.record(), header.checks)
            if verdict is not None and verdict.word != "undecided":
                self.run.update(ended_at=block.stop)
                return True
        return header.ended_at == block.stop

    def _notes(self, record: records.Record, findings: Sequence[records.Finding]) -> list[str]:
        """What this run in particular does not say."""
        notes = []
        if record.n < len(self.data):
            blocked = any(f.severity == "block" for f in findings)
            why = "as a check blocks" if blocked else "as the attacks of the plan had decided the claim"
            notes.append(
                f"The run ended after {record.n:,} of {len(self.data):,} examples, in an order fixed beforehand, {why}; bounds allow "
                "for looking after each block. What ran after the plan ran on these examples alone."
            )
        if _adaptive.naive(self, findings):
            notes.append(_header.NAIVE)
        if self.settings.reject is not None:
            turned = int((record.examples.clean_label == self.settings.reject).sum())
            notes.append(
                f"The model may reject an input. {turned:,} of {record.n:,} unchanged inputs are rejected and count as wrong; an input "
                "that is right and is rejected once it was changed counts as survived."
            )
        return notes

    def _changed(self) -> list[records.Finding]:
        """Are weights and buffers other ones than before the first look? In training mode that is another finding."""
        if any(m.training for m in self.model.modules()) or weights_hash(self.model) == self.weights:
            return []
        return [_header.CHANGED]

    def _clean(self, block: range) -> None:
        """Clean answers of a block of examples, and the control subset: the examples of smallest keyed hash."""
        if len(self.run.ledger.examples()) >= block.stop:  # of an earlier sitting, in one transaction
            return
        ids = self.data.ids
        # the control subset lies in the first block; the order of blocks is that of another keyed hash, or a seal's
        rank = sorted(self._blocks()[0], key=lambda i: (streams.text_key(f"{self.seed} control {ids[i]}"), i))
        control = set(rank[: self.settings.control])
        part = slice(block.start, block.stop)
        label, margin, confidence = self._answers(self.x[part], self.y[part])
        self.run.ledger.put_examples(
            records.Examples(
                id=block, hash=ids[part], label=self.y[part].tolist(), clean_label=label, clean_margin=margin,
                clean_confidence=confidence, control=[i in control for i in block],
            )
        )  # fmt: skip

    def attack(self, index: int, step: PlanStep, attack: Any, block: range) -> None:
        """One attack on whoever of a block is still right, and on the control subset."""
        record = self.run.record()
        alive, answered = survivors(record, index), set(self.run.ledger.answered(index).tolist())
        name = f"{index + 1}/{len(self.steps)} {step.label}"
        for number, (portion, far) in enumerate(portions(record, index, step.share, block)):
            # of all of the portion, whatever an earlier sitting answered, so that bits stay equal
            rows = len(portion) * step.restarts * max(_header.aims(step, self.classes), 1)
            batch = fitting_batch(rows, self.batch, self.x.device.type == "cpu")
            todo = torch.tensor(
                [i for i in portion.tolist() if i not in answered], device=self.x.device, dtype=torch.int64
            )
            self.notify(name, 0, len(todo), 0)
            if len(todo):
                later = any(a < index for a in record.attacks)

                def make(todo: Tensor, batch: int = batch, later: bool = later) -> Job:
                    start = self.start_of(step, todo, alive, later)
                    more = {"start": start, "batch": batch, "average": self.average(index), "seed": self.seed_of(index)}
                    return self.job(attack, todo, **self.settings_of(step), **more)

                self._run(index, f"{name}, from {block.start}, portion {number + 1}", name, todo, portion, make, alive)
            found = self.run.ledger.results(index)
            if np.isin(far, found.example[found.success]).sum() < WORTH * max(len(far), 1):
                break

    def _run(
        self, index: int, stage: str, name: str, todo: Tensor, portion: np.ndarray, make: Callable[[Tensor], Job],
        alive: np.ndarray,
    ) -> None:  # fmt: skip
        """Run a job and write down each example as soon as its answer is final."""
        began, done, broken, total = time.perf_counter(), 0, 0, len(todo)
        answered = torch.from_numpy(self.run.ledger.answered(index)).to(todo)
        # a job that a killed sitting left also holds examples that were written down after its bookmark
        job, todo = self.bookmark.begin(stage, todo, make, torch.from_numpy(portion).to(todo))
        for final in self.bookmark.through(job, stage, todo):
            final = final[~torch.isin(todo[final], answered)]
            self.write(index, todo[final], job.outcome(final), alive)
            now = time.perf_counter()
            self.run.ledger.add_seconds(index, now - began)
            began, done, broken = now, done + len(final), broken + int(job.success[final].sum())
            self.notify(name, done, total, broken)
        self.bookmark.drop()

    def start_of(self, step: PlanStep, todo: Tensor, alive: np.ndarray, later: bool) -> Tensor | None:
        """Where the step begins: at an example of another class, or at what earlier ones found; one that they broke or never tried
        begins at its input.

        Under a limit of queries each step is an attacker of its own, who knows nothing of the others.
        """
        if self.threat.queries is not None:
            return None
        if step.start == "other":
            return nearest_others(self, todo, self.run.record())
        if step.start != "best" or not later:
            return None
        points, position = (
            self.x[todo].clone(),
            {example: at for at, example in enumerate(todo.tolist()) if alive[example]},
        )
        ids, nearest = self.run.ledger.nearest(position)
        if len(ids):
            points[[position[i] for i in ids.tolist()]] = torch.from_numpy(nearest).to(points)
        return points

    def write(self, index: int, ids: Tensor, found: Outcome, alive: np.ndarray) -> None:
        """Record the examples whose answer has just become final, in one transaction."""
        won, draws = _scoring.stands(self, index, found, ids)
        label, _, confidence = self._answers(found.x[won], self.y[ids[won]])
        label_after, confidence_after = self.y[ids].cpu().numpy().copy(), np.full(len(ids), math.nan)
        mask = won.cpu().numpy()
        label_after[mask], confidence_after[mask] = label, confidence
        size, restart = found.size.masked_fill(~won, math.inf), found.restart.masked_fill(~won, -1)
        rows = records.Results(
            example=ids.cpu().numpy(), success=mask, size=size.cpu().numpy(), margin=found.margin.cpu().numpy(),
            restart=restart.cpu().numpy(), label_after=label_after, confidence_after=confidence_after,
            forwards=found.forwards.cpu().numpy(), backwards=found.backwards.cpu().numpy(),
            queries=found.queries.cpu().numpy(),
        )  # fmt: skip
        broken = ids[won].tolist()
        points = dict(zip(broken, found.x[won].cpu().numpy()))
        inputs = dict(zip(broken, self.x[ids[won]].cpu().numpy()))
        nearest = {}
        if self.threat.draws or any(step.start == "best" for step, _ in self.steps[index + 1 :]):
            kept = (~won).nonzero().squeeze(1).tolist()
            nearest = {i: found.x[j].cpu().numpy() for j, i in zip(kept, ids[kept].tolist()) if alive[i]}
        self.run.ledger.put_results(index, rows, points, inputs, nearest, draws)

    def _proof(self, certificate: Any, rows: Any) -> Any:
        from mohs.certificates import certify

        return certify(certificate, self.model, self.x[rows], self.y[rows], self.threat, batch=self.batch)

    def _certify(self, certificate: Any, block: range) -> None:
        name = type(certificate).__name__
        done = self.run.record().certificates().get(name)
        known = set(() if done is None else done.example.tolist())
        todo = [i for i in block if i not in known]
        for at in range(0, len(todo), self.batch):
            part = torch.tensor(todo[at : at + self.batch], device=self.x.device)
            self.notify(name, at, len(todo), 0)
            proof = self._proof(certificate, part)
            rows = records.CertificateRows(
                example=part.cpu().numpy(), holds=proof.holds.cpu().numpy(), radius=proof.radius.cpu().numpy()
            )
            self.run.ledger.put_certificates(name, rows)
        self.notify(name, len(todo), len(todo), 0)

    # ---- small helpers ----------------------------------------------------------------------------------

    def settings_of(self, step: PlanStep) -> dict[str, Any]:
        """What a job is told of a step of the plan."""
        rank = by_distance if step.rank == "distance" else by_logit
        return {"restarts": step.restarts, "aims": _header.aims(step, self.classes), "rank": rank}

    def seed_of(self, index: int) -> int:
        """Of a step: what is added after the plan shall not begin where the plan's own restarts did, nor where a check or the
        plan under another seed does."""
        return self.seed if index < self.planned else streams.text_key(f"{self.seed} after {index}") % (1 << 62)

    def average(self, index: int) -> int | None:
        """Evaluations of a random model per look in an attack: those who survive the first get no fewer than usual.

        One draw may do for most examples, and the tactic takes no more than it needs; it does not for the last of them.
        """
        tactic = self.choice.tactic
        itself = tactic.make is not None and tactic.average == 1  # the guide averages
        if tactic.average is None or itself or index == 0 or not self.threat.draws:
            return tactic.average
        return max(tactic.average, AVERAGE)

    def job(self, attack: Any, todo: Tensor, **settings: Any) -> Job:
        """One attack on the examples ``todo``."""
        batch = settings.pop("batch", self.batch)
        settings = {
            "guide": self.guide,
            "average": self.choice.tactic.average,
            "reject": self.settings.reject,
            "seed": self.seed,
            **settings,
        }
        return Job(attack, self.model, self.x[todo], self.y[todo], self.threat, batch=batch, **settings)

    def _answers(self, x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(label, margin of the true class, confidence) of the model, in the fixed batch shape."""
        labels, margins, confidences = [], [], []
        for at in range(0, len(x), self.batch):
            part, rows = x[at : at + self.batch], min(self.batch, len(x) - at)
            goal, draws = Goal.leave(y[at : at + rows], reject=self.settings.reject), max(self.threat.draws, 1)
            with untouched(self.model, self.seed), torch.no_grad():
                looks = [classify(self.model, padded(part, self.batch))[:rows] for _ in range(draws)]
            # of a model in low precision: its margins shall not be rounded once more, and numpy knows no bfloat16
            looks = [z.float() if z.dtype.itemsize < 4 else z for z in looks]
            logits = torch.stack(looks)
            none = (
                logits.isnan().any(2).any(0)
            )  # argmax would call nan class 0; -1 is nobody's label, so it counts as wrong
            # of a random model: the most frequent answer, with its mean probability and margin
            answers = nn.functional.one_hot(logits.argmax(2), logits.shape[2]).sum(0)
            label = answers.argmax(1)
            labels.append(label.masked_fill(none, -1))
            confidences.append(logits.softmax(2).mean(0).gather(1, label.unsqueeze(1)).squeeze(1))
            margin = torch.stack([-goal.margin(z) for z in looks]).mean(0)
            margins.append(margin.masked_fill(none, math.nan))
        if not labels:
            return np.zeros(0, np.int64), np.zeros(0), np.zeros(0)
        answered, margin_of, confidence = (torch.cat(v).cpu().numpy() for v in (labels, margins, confidences))
        return answered, margin_of, confidence

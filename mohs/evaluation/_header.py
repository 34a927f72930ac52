"""The header of an evaluation: what is about to run, and afterwards what each attack and certificate did, in numbers."""

from __future__ import annotations

import platform
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import mohs
from mohs import records
from mohs.evaluation.claims import Claim
from mohs.evaluation.plans import PlanStep
from mohs.models import BlackBox, Served

if TYPE_CHECKING:
    from mohs.evaluation._stages import Evaluation

Steps = Sequence[tuple[PlanStep, Any]]
"""Steps of a plan that can run, each with its attack."""

CHANGED = records.Finding(
    id="model-changes", name="the model changes while it is looked at", severity="block",
    saw="weights or buffers differ from those before the first look",
    means="Each look meets another model, so the model that was attacked is not the one that is named.",
    remedy="Make forward() leave parameters and buffers alone in eval mode. (They were put back.)",
)  # fmt: skip
"""What no check can say before the end."""


SERVED = (
    "The model was asked over the network, and its weights are unknown: what the server holds, and how it groups inputs, may "
    "change without a trace here. A replay asks whatever answers at that address then."
)
"""What the record of a served model cannot say."""
BLACK_BOX = (
    "The model is a function of which only the answers are known, and it was asked about undecided rows only: where its "
    "arithmetic depends on what else is in a batch, bit-identity is not promised. The name stands for its weights."
)
"""What the record of another black box cannot say."""


NAIVE = (
    "The attacks were not adapted to this model (adaptive='off'), though a defense is declared or a check found its gradients wanting: "
    "the surviving share is not that of an adaptive evaluation, and no claim is upheld by it. Evaluate with adaptive='declared' or "
    "'blind'."
)
"""What survival means where the attacks took no account of what hides the gradients."""


def _limits(model: nn.Module) -> list[str]:
    kinds = {type(m) for m in model.modules() if isinstance(m, BlackBox)}
    served = any(issubclass(kind, Served) for kind in kinds)
    return [SERVED] * served + [BLACK_BOX] * (bool(kinds) and not served)


def known(place: Path, header: records.Header, model: nn.Module) -> bool:
    """Does a directory hold this very run, complete, so that at most the verdict on another claim is missing?"""
    if not (place / "record.json").is_file():
        return False
    stored = records.load_header(place)
    return (
        stored.status == "complete"
        and stored.identity == header.identity
        and stored.stated_accuracy == header.stated_accuracy
        and not any(f.severity == "block" for f in stored.checks)  # that may be mended now
        and not any(m.training for m in model.modules())  # and that may be new
    )


def claimed(claim: Claim | None) -> records.Claim | None:
    """A claim as records hold it."""
    return None if claim is None else records.Claim(text=str(claim), tau=claim.tau, kind=claim.kind)


def _parts(run: Evaluation) -> list[records.Step]:
    return [
        records.Step(
            name=s.name, config=repr(a), restarts=s.restarts, targets=aims(s, run.classes) or None, rank=s.rank,
            start=s.start, share=s.share,
        )
        for s, a in run.steps
    ]  # fmt: skip


def identity(run: Evaluation, **more: str) -> str:
    """Hash of what the results depend on."""
    settings = asdict(run.settings)
    if settings.pop("until") == "decided":  # then where the run ends depends on the claim
        more |= {"until": str(run.claim)}
    return records.identity_of(
        {
            "model": run.weights, "code": run.code, "architecture": repr(run.model), "data": run.data.hash,
            "threat": run.threat.to_dict(),
            "plan": [s.model_dump() for s in _parts(run)], "certificates": [repr(c) for c in run.certificates],
            "version": mohs.__version__, **settings, **more,
        }
    )  # fmt: skip


def of_run(
    run: Evaluation, *, stated_accuracy: float | None, subject: str, command: str, sealed: records.Sealed | None
) -> records.Header:
    """Everything known before the first attack; its identity is what the results depend on."""
    model, data, settings = run.model, run.data, run.settings
    parameters = list(model.parameters())
    return records.Header(
        identity=identity(run), command=command, seed=settings.seed, batch=settings.batch, stated_accuracy=stated_accuracy,
        until=settings.until, adaptive=settings.adaptive, sealed=sealed,
        subject=records.Subject(
            spec=subject, arch=repr(model)[:2000], weights_sha256=run.weights, code_sha256=run.code, classes=max(run.classes, 1),
            reject=settings.reject,
            parameters=sum(p.numel() for p in parameters),
            dtype=str(parameters[0].dtype).removeprefix("torch.") if parameters else "float32",
        ),
        data=records.Data(
            spec=data.name or "tensors", n=len(data), hash=data.hash, shape=list(data.x.shape[1:]),
            class_names=[*data.classes, "rejected"] if settings.reject == len(data.classes) else list(data.classes),
        ),
        threat=run.threat.to_dict(), threat_text=str(run.threat), plan=records.Plan(name=run.plan.name, steps=_parts(run)),
        claim=claimed(run.claim),
        environment=records.Environment(
            python=platform.python_version(), torch=torch.__version__, numpy=np.__version__, mohs=mohs.__version__,
            platform=platform.platform(), threads=torch.get_num_threads(), device=str(run.x.device),
        ),
        limits=_limits(model),
    )  # fmt: skip


def aims(step: PlanStep, classes: int) -> int:
    """How many classes a step moves towards: no more than there are others."""
    return min(step.aims, max(classes - 1, 0))


def attacks(
    record: records.Record, steps: Steps, seconds: dict[int, float], kept: Collection[int] = ()
) -> list[records.AttackSummary]:
    """Each attack that has rows: what it got, what it broke, what it cost, and how it does alone; ``kept``: those of checks."""
    summaries, alive = [], record.correct.copy()
    control = record.examples.control & record.correct
    for index, (step, attack) in enumerate(steps):
        if index not in record.attacks:
            continue
        rows = record.results(index)
        broke = np.zeros(record.n, dtype=bool)
        broke[rows.example[rows.success]] = True
        ran = np.zeros(record.n, dtype=bool)
        ran[rows.example] = True
        given = int((alive & ran).sum())
        newly = int((alive & broke).sum())
        alive &= ~broke
        summaries.append(
            records.AttackSummary(
                index=index, name=step.label + ", within a check" * (index in kept), config=repr(attack), access=attack.needs.name,
                given=given, broke=newly,
                accuracy_after=float(alive.mean()), alone_broke=None if index in kept else int((control & broke).sum()),
                alone_n=None if index in kept else int(control.sum()),
                forwards=int(rows.forwards.sum()), backwards=int(rows.backwards.sum()),
                queries=int(rows.queries.sum()), seconds=seconds.get(index, 0.0),
            )
        )  # fmt: skip
    return summaries


def certificates(record: records.Record) -> list[records.CertificateSummary]:
    """Each certificate that ran."""
    return [
        records.CertificateSummary(name=name, certified=int(rows.holds.sum()), n=len(rows), note="deterministic")
        for name, rows in record.certificates().items()
    ]

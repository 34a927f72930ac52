"""The engine: checks, attacks, certificates, one record. Everything it finds is written down before it goes on."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mohs import records
from mohs.attacks._batches import usual_batch
from mohs.attacks._inputs import check_inputs
from mohs.data import Dataset
from mohs.errors import CertificateContradicted, ModelError, ThreatError, UsageError, rows_text
from mohs.evaluation import _adaptive, _header, claims
from mohs.evaluation._given import dataset
from mohs.evaluation._order import shuffled
from mohs.evaluation._quiet import untouched
from mohs.evaluation._stages import CONTROL, Evaluation, Notify, Settings
from mohs.evaluation.plans import Plan, load_plan
from mohs.evaluation.seal import Seal
from mohs.threat import Access, Threat


@torch.inference_mode(False)  # evaluation code often stands inside inference_mode, which knows no gradients
def evaluate(
    model: nn.Module,
    data: Dataset | tuple[Tensor, Tensor],
    threat: Threat | str,
    *,
    plan: Plan | str | Path = "standard",
    claim: claims.Claim | str | None = None,
    out: str | Path | None = None,
    certificates: Sequence[Any] = (),
    seed: int = 0,
    batch: int | None = None,
    control: int | None = None,
    adaptive: Literal["declared", "blind", "off"] = "declared",
    exam: int = 0,
    until: Literal["end", "decided"] = "end",
    reject: int | None = None,
    seal: Seal | None = None,
    stated_accuracy: float | None = None,
    subject: str | None = None,
    command: str = "",
    notify: Notify | None = None,
) -> records.Record:
    """Try to refute a claim with every attack of a plan (and to prove it with certificates), and record the evidence.

    Args:
        model: a classifier in eval mode, inputs in the box to logits.
        data: a ``Dataset`` or a pair (x float32 or float64 [N, ...], y int64 [N]).
        threat: such as ``"linf:8/255"``; the radius must be finite.
        plan: a ``Plan``, the name of a built-in one, or a TOML file.
        claim: such as ``"accuracy >= 0.6"``; also on ``stability``, or ``certified`` where certificates are given.
        out: directory of the record; an interrupted run in it goes on where it stopped. None: a temporary one
            that lives as long as the returned record.
        certificates: such as ``[mohs.certificates.CROWN()]``.
        seed: of all randomness; the global generators are not touched.
        batch: physical batch size at most. A step on fewer rows takes smaller batches, so results are bit-identical for equal
            examples and equal ``batch``, and within rounding otherwise. Default: 256, fewer for large inputs.
        control: size of the random subset that every attack runs in full, so that their strengths can be compared; the
            accuracy curve and the loss curves come from it too. Default: 100; 0 saves these passes.
        adaptive: where gradients are missing, zero or misleading, or the model is random, other ways to get them are tried on
            32 examples, and the best one guides all attacks: with what defenses declare ("declared"), without believing
            them ("blind"), or not at all ("off"). A random model whose threat has no ``draws`` is scored on 20.
        exam: on so many examples, whether the plan finds an adversarial point that was hidden there (``mohs.exam``); where it
            misses more than a twentieth, an upheld claim deserves no trust. 0: no exam.
        until: "decided" takes the examples in a random order that ``seed`` fixes beforehand, in growing blocks, and ends after
            the first block at which the claim is refuted, certified or upheld; the bounds allow for having looked. What a check
            asks for after the plan runs on these examples alone, and may leave the claim undecided.
        reject: index of the logit by which the model rejects an input: to be rejected is no success for an attack, and no right
            answer either. None: what its defenses declare.
        seal: examples chosen beforehand (``Seal``): evaluate these alone, and write the look down beside the
            seal's file.
        stated_accuracy: clean accuracy the model is said to have, checked against the measured one.
        subject, command: how model and run are named in the record.
        notify: progress, see ``Notify``.

    Returns:
        The record; ``rec.verdict`` is None without a claim.

    Raises:
        DataError, ModelError, ThreatError, RecordError: see the message.
        CertificateContradicted: an attack broke a certified example; the record is complete and names it.

    Cost: a few forwards per example for checks and clean accuracy; each attack as it says, on survivors and on the
    control subset; one forward per adversarial example for its final confidence.
    """
    threat = Threat.parse(threat)
    if threat.minimum:
        raise ThreatError(
            f"An evaluation needs a finite radius; got {threat}. 'At least so many stay right' says nothing about "
            "unbounded changes. Use mohs.attack with a minimum-norm attack for distances."
        )
    if claim is not None and threat.access == Access.NONE:
        raise ThreatError(
            f"A claim was given with access NONE; under {threat} an attack then sees nothing of the model, and what fails "
            "blindly supports no claim. Grant Access.LABEL or more, or leave the claim out."
        )
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"The model must be a torch.nn.Module; got {type(model).__name__}. Wrap a function in mohs.models.BlackBox."
        )
    if type(exam) is not int or exam < 0:
        raise UsageError(f"exam must be a whole number of examples >= 0; got {exam!r}.")
    if exam and (threat.region.kind in ("l0", "patch", "words") or threat.region.eps == 0):
        raise ThreatError(
            f"The exam needs a norm, not l0, patch or words, and a radius above 0; got {threat}. Leave it out."
        )
    if adaptive not in ("declared", "blind", "off"):
        raise UsageError(f"adaptive must be 'declared', 'blind' or 'off'; got {adaptive!r}.")
    if until not in ("end", "decided"):
        raise UsageError(f"until must be 'end' or 'decided'; got {until!r}.")
    if until == "decided" and claim is None:
        raise UsageError("until='decided' needs a claim to decide, such as claim='accuracy >= 0.6'; got none.")
    if seal is not None and out is None:
        raise UsageError(
            "A look at sealed examples needs a record that says what was seen: give out=, the directory of it."
        )
    data = dataset(data)
    if seal is not None:
        data = seal.opened(data)
    if until == "decided":
        data = data.take(indices=shuffled(data, seed))
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), data.x.device)
    x, y = ((t.clone() if t.is_inference() else t).to(device) for t in data)
    check_inputs(x, y, threat, batch=batch)
    if control is not None and (type(control) is not int or control < 0):
        raise UsageError(
            f"control must be a whole number >= 0 (how many examples every attack runs in full); got {control!r}."
        )
    batch = batch or usual_batch(x)
    plan, claim = load_plan(plan), None if claim is None else claims.Claim.parse(claim)
    if claim is not None:
        claims.require(claim, certificates)
    settings = Settings(seed, batch, CONTROL if control is None else control, adaptive, exam, until, reject)
    with untouched(model, seed):  # so that a model that changes while it is looked at is given back as it was
        run = Evaluation(model, data, x, y, threat, plan, claim, list(certificates), settings, notify)
        if claim is not None:
            claims.require(claim, certificates, rejects=run.settings.reject is not None)
        looked = None if seal is None or out is None else seal.look(run.identity(out), command or "mohs.evaluate")
        _adaptive.look(run, stated_accuracy)
        header = run.header(stated_accuracy, subject or type(model).__name__, command, looked)
        # whatever can be refused is refused before the directory is touched
        findings = None if out is not None and _header.known(Path(out), header, model) else run.check()
        record = _recorded(run, header, findings, out)
    if len(record.contradicted):
        raise CertificateContradicted(
            f"A certificate declared {rows_text(record.contradicted.tolist())} safe under {threat}, and an attack broke "
            f"it. One of the two is wrong: please report the record {record.dir} with the model."
        )
    if out is None:
        record.temporary = weakref.finalize(record, shutil.rmtree, record.dir, ignore_errors=True)
    return record


def _recorded(
    run: Evaluation, header: records.Header, findings: list[records.Finding] | None, out: str | Path | None
) -> records.Record:
    """Do what is missing in the directory, or only judge what is there (findings: None)."""
    place = Path(tempfile.mkdtemp(prefix="mohs-")) if out is None else Path(str(out))
    try:
        with records.open_run(place, header) as opened:
            if findings is None:
                run.judge(opened, header.sealed)
            else:
                run.go(opened, header, findings)
            return opened.record()
    except BaseException as error:
        if out is None:
            shutil.rmtree(place, ignore_errors=True)
        elif isinstance(error, ModelError) and findings is not None:
            error.add_note(f"What was found before is kept in {place}: the same evaluation goes on from there.")
        raise

"""Replay: re-score the stored adversarial examples of a record on the model, without attacking."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mohs.errors import RecordError
from mohs.evaluation._quiet import untouched
from mohs.evaluation.confirmation import asked
from mohs.models import weights_hash
from mohs.models.code import code_parts, hash_of_parts
from mohs.problem import Goal
from mohs.records import Record
from mohs.target import classify, rounding
from mohs.threat import Threat


@dataclass(frozen=True)
class Replayed:
    """What a second look at the evidence gave.

    Attributes:
        points: adversarial examples looked at.
        confirmed: of these, inside region and box and answered wrongly.
        outside: (attack, example) of those outside the region or the box.
        right: (attack, example) of those the model answers rightly now.
        same_model: do the weights have the recorded hash, and the code too where ``same_code`` can tell?
        same_weights: that of the weights alone.
        same_code: has the code the recorded hash? None: the record has none, or is of another version of Python, which compiles to
            other bytecode.
        other_draws: of a random model, why its draws are others than those of the run, so that a point which is wrong in little more
            than half of them may be answered rightly here though nobody changed anything; '' if they are the same.
    """

    points: int
    confirmed: int
    outside: list[tuple[int, int]]
    right: list[tuple[int, int]]
    same_model: bool
    other_draws: str = ""
    same_weights: bool = True
    same_code: bool | None = None

    @property
    def holds(self) -> bool:
        """Was every stored adversarial example confirmed?"""
        return self.confirmed == self.points


def replay(record: Record, model: nn.Module) -> Replayed:
    """Look at every stored adversarial example again, in the recorded batch shape.

    A point that broke a random model is asked on the very draws that confirmed it in the run (``mohs.evaluation.confirm``), and
    has to be answered wrongly as often as it had to be then. The very same draws are had only on the same type of device and with
    the same version of torch, as the generators of others give other numbers; elsewhere ``Replayed.other_draws`` says so.

    Args:
        record: of a finished or interrupted run; its rows are first compared with their digest if it is finished.
        model: the model under test, in eval mode; another one answers whether the examples transfer to it.

    Returns:
        What was confirmed and what was not. Cost: one forward per stored example, or as many as confirmed it (see
        ``mohs.evaluation.confirm``).

    Raises:
        RecordError: the rows were changed after the run, or hold points without their clean inputs.
    """
    if record.header.status == "complete":
        record.verify()
    threat = Threat.from_dict(record.header.threat)
    batch, reject = record.header.batch or 256, record.header.subject.reject
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    code = code_parts(model)
    points = confirmed = 0
    outside: list[tuple[int, int]] = []
    right: list[tuple[int, int]] = []
    for attack in record.attacks:
        examples, found = record.points(attack)
        known, clean = record.inputs(examples.tolist())
        if not np.array_equal(known, examples):
            raise RecordError(f"{record.dir} lacks the clean inputs of attack {attack}; it cannot be replayed.")
        for at in range(0, len(examples), batch):
            ids = examples[at : at + batch]
            x = torch.from_numpy(found[at : at + batch]).to(device)
            x0 = torch.from_numpy(clean[at : at + batch]).to(device)
            y = torch.from_numpy(record.examples.label[ids]).to(device)
            eps = torch.full((len(x),), threat.region.eps, dtype=x.dtype, device=device)
            inside = threat.region.contains(x, x0, eps)
            inside &= (x.flatten(1).amin(1) >= threat.box[0]) & (x.flatten(1).amax(1) <= threat.box[1])
            if threat.draws:
                look = torch.from_numpy(record.confirmation(attack, ids)).to(device)
                at_ids = torch.from_numpy(ids).to(device)
                met = asked(model, x, y, at_ids, look, threat, record.header.seed, reject).broken
            else:
                met = wrong(model, x, y, batch, record.header.seed, reject)
            points += len(ids)
            confirmed += int((inside & met).sum())
            outside += [(attack, int(i)) for i in ids[(~inside).cpu().numpy()]]
            right += [(attack, int(i)) for i in ids[(~met).cpu().numpy()]]
    same_code = _same_code(record, code, model)
    same = weights_hash(model) == record.header.subject.weights_sha256
    other = _other_draws(record, threat, device)
    return Replayed(points, confirmed, outside, right, same and same_code is not False, other, same, same_code)


def _same_code(record: Record, before: dict[str, str], model: nn.Module) -> bool | None:
    """Has the code the recorded hash, leaving out what the looks since ``before`` changed? None: that cannot be told."""
    then = record.header.subject.code_sha256
    python = tuple(record.header.environment.python.split(".")[:2])
    if not then or platform.python_version_tuple()[:2] != python:
        return None
    return hash_of_parts(before, code_parts(model)) == then


def _other_draws(record: Record, threat: Threat, device: torch.device) -> str:
    """Why the draws of a random model cannot be those of the run; '' if they can."""
    then = record.header.environment
    made = then.torch.split("+")[0], then.device.split(":")[0]
    here = torch.__version__.split("+")[0], device.type
    if not threat.draws or made == here:
        return ""
    return (
        f"The run drew with torch {made[0] or 'of an unknown version'} on {made[1] or 'an unknown device'}, this replay with torch "
        f"{here[0]} on {here[1]}, which gives other random numbers: a point that is wrong in little more than half of the draws may "
        "be answered rightly here though nothing was changed. Replay where the run was made to get its draws."
    )


def wrong(model: nn.Module, x: Tensor, y: Tensor, batch: int, seed: int, reject: int | None = None) -> Tensor:
    """Is each point answered wrongly and not rejected, [B], in the batch shape of the run?"""
    if not len(x):
        return torch.zeros(0, dtype=torch.bool, device=x.device)
    fill = torch.arange(batch, device=x.device).clamp_max(len(x) - 1)
    with untouched(model, seed), torch.no_grad():
        logits = classify(model, x[fill])[: len(x)]
    return Goal.leave(y, reject=reject).margin(logits) > rounding(logits)

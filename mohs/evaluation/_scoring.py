"""How an evaluation scores a model with randomness of its own: which breaks stand, and what a single draw would answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mohs import records
from mohs.attacks import Outcome
from mohs.evaluation.confirmation import asked, fresh

if TYPE_CHECKING:
    from mohs.evaluation._stages import Evaluation

PART = 1024
"""Examples whose points are in memory at once."""


def stands(run: Evaluation, index: int, found: Outcome, ids: Tensor) -> tuple[Tensor, records.Draws | None]:
    """Which of an attack's successes stand, [B], and the draws that say so; of a deterministic model all do.

    See ``mohs.evaluation.confirm``. The look at an example is the next one after those of earlier attacks.
    """
    if not run.threat.draws:
        return found.success, None
    won = found.success.clone()
    rows = won.nonzero().squeeze(1)
    examples = ids[rows].cpu().numpy()
    looks = 1 + run.run.ledger.confirmations(index, examples)
    seen = asked(
        run.model, found.x[rows], run.y[ids[rows]], ids[rows], torch.from_numpy(looks).to(ids), run.threat, run.seed,
        run.settings.reject,
    )  # fmt: skip
    won[rows] = seen.broken
    said = records.Draws(
        attack=np.full(len(rows), index),
        example=examples,
        drawn=seen.drawn.cpu().numpy(),
        wrong=seen.wrong.cpu().numpy(),
    )
    return won, said


def score(run: Evaluation) -> None:
    """Write down, for each example, on how many of the threat's draws the strongest point found is answered wrongly.

    It is the point that broke the example; else the one of highest margin; else, and where the unchanged input is wrong, that
    input. These draws chose nothing, so their share is not flattered by luck.

    Each part is written down at once; a run that was killed between two of them goes on with the examples that have no score.
    """
    record = run.run.record()
    if not run.threat.draws or record.scores is not None:
        return
    left = np.setdiff1d(np.arange(record.n), record.draws.example[record.draws.attack == records.SCORE])
    for at in range(0, len(left), PART):
        part = left[at : at + PART]
        ids = torch.from_numpy(part).to(run.x.device)
        points = run.x[ids].clone()
        for attack in record.attacks:
            _put(points, part, *run.run.ledger.points(attack, part[record.breaker[part] == attack].tolist()))
        _put(points, part, *run.run.ledger.nearest(part[record.survived[part]].tolist()))
        wrong = fresh(
            run.model, points, run.y[ids], ids, torch.zeros_like(ids), run.threat.draws, run.seed, run.settings.reject
        )
        run.run.ledger.put_draws(
            records.Draws(
                attack=np.full(len(part), records.SCORE), example=part, drawn=np.full(len(part), run.threat.draws),
                wrong=wrong.cpu().numpy(),
            )
        )  # fmt: skip


def _put(points: Tensor, part: np.ndarray, ids: np.ndarray, found: np.ndarray) -> None:
    if len(ids):
        points[torch.from_numpy(np.searchsorted(part, ids)).to(points.device)] = torch.from_numpy(found).to(points)

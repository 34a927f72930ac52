"""What the checks after the plan share: its rows, and a few short attacks, each run once and only if asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mohs import streams
from mohs.attacks import Job, Outcome, PatchSearch, Square
from mohs.attacks._batches import fitting_batch
from mohs.evaluation._inner import undefended
from mohs.evaluation._quiet import untouched
from mohs.evaluation._rejection import rejection
from mohs.evaluation.checks._seen import Seen, ok
from mohs.evaluation.confirmation import confirm
from mohs.models import BlackBox
from mohs.problem import Goal
from mohs.records.stats import clopper_pearson
from mohs.regions import Patch
from mohs.target import classify, rounding
from mohs.threat import Access, Threat

if TYPE_CHECKING:
    from mohs.evaluation._stages import Evaluation

SHARE = 0.01
"""Of the passes that the plan took, about so much goes into each look of these checks, beyond the fewest rows that say anything."""
AGAIN = 0.1
"""The same of a later look, which is to be no weaker than the one before."""
LEAST, MOST = 6, 32
"""Rows of such a look."""
NEWLY, LEVEL = 0.002, 0.01
"""Lesser attacks may break such a share of what better ones left; more counts where an exact test at this level says so."""
FEW = "A few are to be expected: each attack finds some that others miss."


def surprising(new: int, of: int) -> bool:
    """Do ``new`` breaks among ``of`` survivors show, by an exact binomial test, that more than the share ``NEWLY`` would fall?
    A single one never does.

    >>> surprising(1, 16), surprising(2, 16), surprising(2, 64), surprising(2, 100)
    (False, True, True, False)
    """
    return new > 1 and clopper_pearson(new, of, LEVEL, sides=1)[0] > NEWLY


def by_scores(threat: Threat, steps: int) -> Square | PatchSearch:
    """The search without gradients that serves a threat."""
    return PatchSearch(steps=steps) if isinstance(threat.region, Patch) else Square(steps=steps)


def excused(saw: str, new: int, of: int) -> Seen | None:
    """What to say where a lesser attack broke ``new`` of ``of`` survivors, and that is no suspicion; None where it is one."""
    if not new:
        return ok(saw)
    return None if surprising(new, of) else Seen("info", saw, FEW)


@dataclass(frozen=True)
class Find:
    """An attack of a check that broke some: on which examples it ran, what came out, and how often it tried."""

    attack: Any
    rows: Tensor
    found: Outcome
    restarts: int
    aims: int


class Review:
    """An evaluation after its plan: who was broken by what, and how to try a little more.

    Args:
        run: the evaluation, with its open record.
        upto: only rows of attacks before this one count, so that a resumed run sees what an uninterrupted one saw.

    ``attacks`` are those that ran, ``past`` those and what earlier looks broke. ``passes``: forwards and backwards of the attacks that
    were tried so far; ``finds``: those that broke the model itself within the threat. ``seen``: what the checks before this one saw,
    by id.
    """

    def __init__(self, run: Evaluation, upto: int, thorough: bool = False) -> None:
        self.run, self.upto, self.threat = run, upto, run.threat
        self.thorough = thorough
        self.record = run.run.record()
        self.past = [a for a in self.record.attacks if a < upto]
        self.attacks = [a for a in self.past if a not in run.kept]
        self.steps = run.steps[:upto]
        self.passes = 0
        self.finds: list[Find] = []
        self.seen: Mapping[str, Seen] = {}

    # ---- rows -------------------------------------------------------------------------------------------

    def won(self, attacks: list[int]) -> NDArray[np.bool_]:
        """Which examples some of these attacks broke, [N]."""
        broke = np.zeros(self.record.n, dtype=bool)
        for index in attacks:
            rows = self.record.results(index)
            broke[rows.example[rows.success]] = True
        return broke

    @cached_property
    def alive(self) -> NDArray[np.bool_]:
        """Examples that are right and unbroken, [N]."""
        return self.record.correct & ~self.won(self.past)

    @cached_property
    def control(self) -> NDArray[np.int64]:
        """Positions of the examples that each of the plan's attacks got in full."""
        kept = self.record.correct & self.record.examples.control
        for index in self.attacks:
            ran = np.zeros(self.record.n, dtype=bool)
            ran[self.record.results(index).example] = True
            kept &= ran
        return np.flatnonzero(kept)

    @cached_property
    def best(self) -> NDArray[np.float64]:
        """The highest margin that was reached at each example, [N]; above 0 is broken."""
        best = -self.record.examples.clean_margin
        for index in self.past:
            rows = self.record.results(index)
            best[rows.example] = np.fmax(best[rows.example], rows.margin)
        return np.nan_to_num(best, nan=-np.inf)

    def near(self, count: int, among: NDArray[np.bool_] | None = None) -> Tensor:
        """Positions of the survivors (or of others) that are nearest to breaking, at most ``count``."""
        among = self.alive if among is None else among
        order = np.lexsort((np.arange(self.record.n), -self.best))
        return torch.from_numpy(order[among[order]][:count]).to(self.run.x.device)

    @property
    def blind(self) -> list[int]:
        """The attacks that ask for no gradients."""
        return [a for a in self.attacks if self.steps[a][1].needs < Access.GRADIENT]

    @property
    def sighted(self) -> list[int]:
        """The attacks that follow gradients, more than one step of them."""
        return [a for a in self.attacks if self.steps[a][1].needs >= Access.GRADIENT and self.steps[a][1].steps > 1]

    @cached_property
    def spent(self) -> int:
        """Forwards and backwards of the plan."""
        rows = [self.record.results(a) for a in self.attacks]
        return int(sum(r.forwards.sum() + r.backwards.sum() for r in rows))

    def afford(self, passes: int, least: int = LEAST, most: int = MOST) -> int:
        """How many rows a look of so many passes per row may take; a thorough one has ten times the passes."""
        share = AGAIN if self.thorough else SHARE
        return int(np.clip(share * self.spent / max(passes, 1), least, most))

    # ---- a little more ----------------------------------------------------------------------------------

    @cached_property
    def closed(self) -> str:
        """Why no check may look at the model any more; '' if it may."""
        if self.threat.access == Access.NONE:
            return "the threat shows nothing of the model"
        if self.threat.queries is not None:
            return "the threat limits the queries"
        if any(isinstance(m, BlackBox) for m in self.run.model.modules()):
            return "each look at this model has its price"
        return "" if self.attacks else "no attack ran"

    @cached_property
    def strongest(self) -> tuple[int, Any] | None:
        """Of the attacks at a fixed radius, those with gradients first: the one that broke most of the control subset (of
        equals, of fewer aims, then the later one), and its place in the plan; None: there is none whose steps can be set."""
        able = [a for a in self.attacks if self.steps[a][1].finite and _has_steps(self.steps[a][1])]
        if not able:
            return None

        def power(a: int) -> tuple[bool, int, int, int]:
            aims = self.run.settings_of(self.steps[a][0])["aims"]  # each aim is a price of its own
            return a in self.sighted, int(self.won([a])[self.control].sum()), -max(aims, 1), a

        index = max(able, key=power)
        return index, self.steps[index][1]

    @property
    def manner(self) -> dict[str, Any]:
        """Restarts, aims and their order, as the strongest attack had them in the plan."""
        assert self.strongest is not None
        return self.run.settings_of(self.steps[self.strongest[0]][0])

    def start(self, rows: Tensor) -> Tensor | None:
        """Where a step like that of the strongest attack begins now, as the plan says; None: at the inputs, or as the attack
        decides."""
        assert self.strongest is not None
        index = self.strongest[0]
        return self.run.start_of(self.steps[index][0], rows, self.alive, any(a < index for a in self.attacks))

    @property
    def elsewhere(self) -> str:
        """Why the strongest attack cannot be run once more as it ran; '' where it can."""
        assert self.strongest is not None
        own = self.steps[self.strongest[0]][0].start == "own"
        return "" if own else "it began where earlier attacks or other examples were"

    def longer(self, times: int = 2) -> Any:
        """The strongest attack with so many times the steps."""
        assert self.strongest is not None
        attack = self.strongest[1]
        return replace(attack, steps=times * attack.steps)

    @cached_property
    def inner(self) -> tuple[nn.Module, str] | None:
        """The model without its defense, and what was left out; None where there is none to be told apart."""
        rows = self.near(MOST, self.record.correct)
        if not len(rows) or self.run.settings.reject is not None:  # what is inside has no logit to reject by
            return None
        return undefended(
            self.run.model, self.run.x[rows], self.run.y[rows], believe=self.run.settings.adaptive != "blind"
        )

    def tried(self, attack: Any, rows: Tensor, *, other: int = 0, **settings: Any) -> Outcome:
        """One attack on the examples ``rows``, with the gradients that the plan has for its last step and at least as many draws;
        ``other``: on other random streams."""
        run = self.run
        settings = {
            "guide": run.guide, "average": run.average(self.upto), "reject": run.settings.reject, **settings
        }  # fmt: skip
        count = len(rows) * settings.get("restarts", 1)
        model = settings.pop("model", run.model)
        job = Job(
            attack, model, run.x[rows], run.y[rows], run.threat, seed=self._seed(other),
            batch=fitting_batch(count, run.batch, run.x.device.type == "cpu"), **settings,
        )  # fmt: skip
        for _ in job.run():
            pass
        self.passes += job.spent
        found = job.outcome()
        if self.threat.draws and model is run.model:  # of many looks at a random model some win by luck
            won = found.success.nonzero().squeeze(1)
            # draws of its own: not those that confirmed or refuted what an attack of the run found at these examples
            fresh = streams.text_key(f"{run.seed} check {self.upto} {other} {attack!r}") % (1 << 62)
            stand = confirm(
                model,
                found.x[won],
                run.y[rows][won],
                self.threat,
                seed=fresh,
                reject=run.settings.reject,
                ids=rows[won],
            )
            found = replace(found, success=found.success.index_put((won,), stand))
        if model is run.model and "eps" not in settings and bool(found.success.any()):
            self.finds.append(Find(attack, rows, found, settings.get("restarts", 1), settings.get("aims", 0)))
        return found

    def _seed(self, other: int) -> int:
        """Of a check's attack: the plan's, so that only what is looked at differs; or one that no step of a run has, nor an earlier
        look of the same check."""
        return streams.text_key(f"{self.run.seed} check {self.upto} {other}") % (1 << 62) if other else self.run.seed


def fools(model: nn.Module, x: Tensor, y: Tensor, draws: int, seed: int, reject: int | None, batch: int = 64) -> Tensor:
    """Is each point answered wrongly and not rejected, [B], by most of the draws (one of a deterministic model)? A lead within
    rounding counts: it may have been a little more in another batch. ``reject`` as in ``confirm``."""
    looks, wins = max(draws, 1), torch.zeros(len(x), dtype=torch.int64, device=x.device)
    with untouched(model, seed), torch.no_grad():
        for at in range(0, len(x), batch):
            goal: Goal | None = None
            for _ in range(looks):
                logits = classify(model, x[at : at + batch])
                goal = goal or Goal.leave(y[at : at + batch], reject=rejection(model, logits.shape[1], reject))
                wins[at : at + batch] += goal.margin(logits) > -rounding(logits)
    return wins * 2 > looks


def _has_steps(attack: Any) -> bool:
    return attack.steps > 1 and is_dataclass(attack) and "steps" in attack.__dataclass_fields__

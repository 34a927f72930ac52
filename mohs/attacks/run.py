"""The scheduler: runs every attack over rows in waves, and turns rows back into examples.

A row is one try at one example: a restart or an aim. All rows of a *wave* are at the same step k; a wave is several
physical batches of one fixed, padded shape. Whenever the live rows fit into fewer batches, settled rows leave and the tail of
the wave fills their places. The next wave starts from what waits, and higher rows fill the hole of its last batch.

An example's answer is its lowest-numbered successful row, and a success cancels only the rows numbered above it. (Of a random
model only a success beyond doubt does; without one the best row answers.) With the fixed batch shape and counter-based randomness
this makes an example's result bit-identical on one machine whatever the order, subset, wave, shard or resumption, as far as the
model's own arithmetic does not depend on a row's place in the batch (matrix products of some shapes do; the check 'independence of
the batch' measures it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mohs import streams
from mohs.attacks._base import Attack
from mohs.attacks._batches import fitting_batch, usual_batch
from mohs.attacks._inputs import check_inputs, check_mode, check_run, check_start, share_of_queries
from mohs.attacks._outcome import Outcome, Stop
from mohs.attacks._quiet import QuietGenerators, keep_memory
from mohs.attacks._ranking import Ranking, by_logit
from mohs.attacks._wave import Wave
from mohs.errors import AccessError, ThreatError, UsageError
from mohs.guide import Guide
from mohs.problem import Findings, Goal, Problem
from mohs.regions import per_row
from mohs.target import Target
from mohs.threat import Access, Threat

AVERAGE = 10
"""Evaluations per look at a random model where nobody says: most of the noise is gone, at ten times the passes."""
WAVE = 8
"""Batches per wave: enough to fill holes, few enough that the wave's rows stay in memory."""


def refused_norm(attack: Attack | type, threat: Threat) -> str | None:
    """Why the attack cannot run in the threat's region, or None if it can."""
    kind, served = threat.region.kind, getattr(attack, "norms", None)
    if served is None or kind in served:
        return None
    name = attack.__name__ if isinstance(attack, type) else type(attack).__name__
    return f"{name} does not serve {threat.region.name}. It serves: {', '.join(served)}"


def attack(
    attack: Attack,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat | str,
    *,
    targets: Tensor | None = None,
    restarts: int = 1,
    aims: int = 0,
    rank: Ranking = by_logit,
    eps: Tensor | None = None,
    confidence: float = 0.0,
    reject: int | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    batch: int | None = None,
    stop: Stop | None = None,
    trace: bool = False,
    guide: nn.Module | None = None,
    average: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Run one attack on a batch of examples.

    Args:
        attack: such as ``mohs.attacks.PGD(steps=40)``.
        model: inputs in the box to logits [N, K], or one logit [N] or [N, 1]; in eval mode.
        x: clean inputs [N, ...], floating point, inside the threat's box.
        y: true classes [N].
        threat: a ``Threat`` or its short form, such as ``"linf:8/255"``; ``"l2:inf"`` asks for the smallest change.
        targets: classes to reach instead [N]; then success is exactly that class.
        restarts: independent tries per example; they share the threat's query limit evenly.
        aims: move towards each of that many classes in turn while any wrong class still counts as success
            (multi-targeted): restarts * aims rows; 0: no aim.
        rank: which classes are aimed at first: ``mohs.attacks.by_logit`` (highest logits) or ``by_distance`` (nearest
            linearised boundaries).
        eps: a radius per example [N], instead of the threat's.
        confidence: by how many logits the wrong answer must win to count.
        reject: index of the logit by which the model rejects an input: to be rejected is no success then.
        start: points [N, ...] to begin from, such as an earlier outcome's ``x``; they are brought into region and box (into the
            box alone for attacks that come from outside the region, such as HopSkipJump).
        seed: of the random streams; the global generators are not touched.
        batch: the physical batch size every pass has; results are bit-identical for equal ``batch``. Default: one that
            suits the number of rows, at most 256, fewer for large inputs and uneven attacks (``attacks/_batches.py``).
        stop: when a row ends; default: at the first success at a finite radius, else when the budget is spent.
        trace: keep the objective at every look (implies that the budget is spent).
        guide: what gives the gradients: a ``mohs.gradients.Guide`` of the model, whose answers are the model's, or any other
            module; what is found with that is confirmed on ``model``.
        average: evaluations of a random model per look, whose objectives are averaged (expectation over transformation).
            Default: as many as the threat's ``draws`` score it with, at most 10. What is found on one is a candidate, as many
            looks also win by luck: see ``mohs.evaluation.confirm``.
        progress: called with (examples finished, of these broken).

    Returns:
        An ``Outcome`` of per-example tensors on the device of ``x``.

    Raises:
        DataError, ModelError, ThreatError, AccessError: see the message; batches name their rows.
    """
    with torch.inference_mode(False):  # evaluation code often stands inside inference_mode, which knows no gradients
        job = Job(
            attack, model, x, y, Threat.parse(threat), targets=targets, restarts=restarts, aims=aims, rank=rank, eps=eps,
            confidence=confidence, reject=reject, start=start, seed=seed, batch=batch, stop=stop, trace=trace, guide=guide,
            average=average,
        )  # fmt: skip
        finished = broken = 0
        for final in job.run():
            if progress is not None and len(final):
                finished += len(final)
                broken += int(job.success[final].sum())
                progress(finished, broken)
        return job.outcome()


class Job:
    """One attack on one set of examples: builds the rows, runs the waves, and merges rows into examples."""

    def __init__(
        self, attack: Attack, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *,
        targets: Tensor | None = None, restarts: int = 1, aims: int = 0, rank: Ranking = by_logit,
        eps: Tensor | None = None, confidence: float = 0.0, reject: int | None = None, start: Tensor | None = None, seed: int = 0,
        batch: int | None = None, stop: Stop | None = None, trace: bool = False, guide: nn.Module | None = None,
        average: int | None = None,
    ) -> None:  # fmt: skip
        check_inputs(x, y, threat, targets=targets, eps=eps, restarts=restarts, aims=aims, batch=batch)
        check_start(start, x, confidence)
        check_mode(model)
        if guide is not None:
            check_mode(guide)
        check_run(attack, seed, reject, stop, average, rank)
        average = min(threat.draws, AVERAGE) or 1 if average is None else average
        if threat.queries is not None and isinstance(guide, Guide) and guide.needs < Access.GRADIENT:
            raise UsageError(
                f"{type(guide).__name__} looks at the model {guide.backwards} times for each gradient, which a limit of "
                f"{threat.queries} queries does not count. Leave the limit out, or use an attack that needs no gradients."
            )
        if attack.needs > threat.access and guide is None:
            raise AccessError(
                f"{attack!r} needs access {attack.needs.name}; the threat {threat} grants {threat.access.name}. "
                f"Choose an attack that needs no more, or Threat(access=Access.{attack.needs.name})."
            )
        radii = torch.full((len(x),), threat.region.eps, dtype=x.dtype, device=x.device)
        self.eps = radii if eps is None else eps.to(x)
        if attack.finite and not bool(self.eps.isfinite().all()):
            raise ThreatError(
                f"{attack!r} needs a finite radius; got {threat}. Give one, such as '{threat.region.name}:0.1', or use a "
                "minimum-norm attack such as DeepFool."
            )
        if aims and threat.access < Access.LOGIT and guide is None:
            raise AccessError(
                f"aims ranks the classes by their logits, which needs access LOGIT; the threat {threat} grants "
                f"{threat.access.name}. Leave aims out, or use Threat(access=Access.LOGIT)."
            )
        if reason := refused_norm(attack, threat):
            raise ThreatError(f"{reason}. Choose one of these, or another attack.")
        self.attack, self.threat, self.seed = attack, threat, seed
        self.rank, self.confidence, self.start, self.reject = rank, confidence, start, reject
        if not getattr(attack, "random", True) and threat.draws == 0:
            restarts = 1  # a further restart of a deterministic attack is the same one
        self.rows = restarts * max(aims, 1)
        share = share_of_queries(threat.queries, self.rows, aims)
        self.target = Target(
            model, threat.access, guide, share, threat.draws, y if targets is None else targets, average
        )
        self.x, self.y, self.targets = x.detach(), y, targets
        self.aims = aims
        whole = trace or threat.minimum
        self.stop = stop or (Stop.BUDGET if whole else Stop.SUCCESS)
        if whole and self.stop is not Stop.BUDGET:
            raise UsageError(
                f"stop={self.stop} contradicts a trace or an infinite radius, which spend the whole budget and need each look."
            )
        if self.stop is Stop.LAST and (self.rows > 1 or not getattr(attack, "last", False)):
            raise UsageError(
                f"stop=Stop.LAST takes the last iterate of one try, unjudged; got {attack!r} with {self.rows} rows for each example. "
                "Allowed: one restart without aims, of an attack that only moves along gradients, such as PGD. Take Stop.BUDGET."
            )
        self.target.judges = self.stop is not Stop.LAST
        shrinking = x.device.type == "cpu" and (self.stop is Stop.SUCCESS or getattr(attack, "uneven", False))
        self.batch = batch or fitting_batch(len(x) * self.rows, max(usual_batch(x, attack) // average, 1), shrinking)
        count = (len(x), self.rows)
        self.finished = torch.zeros(count, dtype=torch.bool, device=x.device)
        self.emitted = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.answer = y.new_full((len(x),), self.rows)  # lowest successful row; `rows`: none yet
        self.owner = y.new_full((len(x),), self.rows)  # the row whose point is kept
        self.cost = y.new_zeros((3, *count))
        self.best = self.x.clone()
        self.success = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.error = self.success.clone()
        self.score = x.new_full((len(x),), -math.inf)
        self.margin = x.new_full((len(x),), -math.inf)
        self.spent = 0
        self.trace = x.new_full((*count, attack.steps + 1), math.nan) if trace else None
        self.key = streams.derive(streams.derive(streams.content_keys(self.x), seed), streams.text_key(repr(attack)))
        self.ranking: list[Tensor] = []
        self.ranked: Tensor | None = None
        self.waiting = self._rows()
        self.wave: Wave | None = None

    def run(self) -> Iterator[Tensor]:
        """Run everything, or what is left of it; yields after each batch's step: the indices of the examples whose answer has
        just become final, mostly none. There the job may be saved (``mohs.attacks._wave.save``)."""
        if self.x.device.type == "cpu":
            keep_memory()
        none = self.emitted.nonzero()[:0].squeeze(1)
        if self.stop is Stop.LAST:
            yield from self._iterate()
            return
        if self.aims:
            for _ in self._rank_classes():
                yield none
        while self.wave is not None or self._next_wave():
            for merged in self._run_wave():
                yield self._finalise() if merged else none

    def _iterate(self) -> Iterator[Tensor]:
        """All steps of each batch, and where they end: nothing is judged, so there is nothing to drop or to merge."""
        for part in torch.arange(len(self.x), device=self.x.device).split(self.batch) if len(self.x) else ():
            problem = self.problem(part, torch.zeros_like(part))
            if len(part) < self.batch:
                problem = self._padded(problem)
            with QuietGenerators(self.seed, int(part[0]), 0):
                state = self.attack.init(problem)
                for k in range(self.attack.steps):
                    state = self.attack.step(problem, state, k)
            rows = len(part)
            self.best[part] = state.x[:rows].detach()
            self.cost[:2, part, 0] = torch.stack([problem.found.forwards, problem.found.backwards])[:, :rows]
            self.finished[part] = self.emitted[part] = True
            self.spent += int(self.cost[:2, part].sum())
            yield part

    def _rows(self) -> Tensor:
        """(example, number) of all rows: every example's first one before anybody's second, a slab of examples at a time,
        so that what is finished early is safe early."""
        slabs = torch.arange(len(self.x), device=self.x.device).split(self.batch * WAVE)
        return torch.cat([torch.stack([s.repeat(self.rows), self._numbers(len(s))]) for s in slabs], 1)

    def _next_wave(self) -> bool:
        """Form the next wave: the rows of the lowest number, up to a full wave, and as many higher ones as fit into the hole
        of its last batch, where they cost nothing. False: nothing waits."""
        example, number = self.waiting
        self.waiting = self.waiting[:, number < self.answer[example]]
        example, number = self.waiting
        if not len(number):
            return False
        others = (number != number[0]).nonzero()
        # the run at the head, of one slab where there are restarts
        lowest = int(others[0]) if len(others) else len(number)
        take = min(-(-min(lowest, self.batch * WAVE) // self.batch) * self.batch, len(number))
        self.waiting = self.waiting[:, take:]
        problem = self.problem(example[:take], number[:take])
        parts = torch.arange(take, device=self.x.device).split(self.batch)
        quiet = QuietGenerators(self.seed, int(example[0]), int(number[0]))
        self.wave = Wave([(self._padded(problem.take(index)), None) for index in parts], quiet)
        return True

    def _numbers(self, examples: int) -> Tensor:
        return torch.arange(self.rows, device=self.x.device).repeat_interleave(examples)

    def outcome(self, of: Tensor | None = None) -> Outcome:
        """What has been found so far, of all examples or of those at ``of``."""
        of = torch.arange(len(self.x), device=self.x.device) if of is None else of
        counted = torch.arange(self.rows, device=self.x.device) <= self.answer[of].unsqueeze(1)
        if self.stop is not Stop.SUCCESS:
            counted = torch.ones_like(counted)
        forwards, backwards, queries = (self.cost[:, of] * counted).sum(2)
        x, success = self.best[of], self.success[of]
        size = self.margin.new_full((len(of),), math.inf)
        if bool(success.any()):
            size = self.threat.region.measure(x, self.x[of]).masked_fill(~success, math.inf)
        return Outcome(
            x=x, success=success, size=size, margin=self.margin[of],
            restart=self.owner[of].masked_fill(~success, -1), forwards=forwards, backwards=backwards,
            queries=queries, spent=self.spent, batch=self.batch, error=self.error[of],
            trace=None if self.trace is None else self.trace[of],
        )  # fmt: skip

    def _rank_classes(self) -> Iterator[None]:
        """Note the classes other than the label, the most promising first, [N, aims]; pauses after each batch."""
        parts = torch.arange(len(self.x), device=self.x.device).split(self.batch)
        for part in parts[len(self.ranking) :] if len(self.x) else ():
            problem = self._padded(self.problem(part, torch.zeros_like(part)))
            with QuietGenerators(self.seed, int(part[0]), 0):
                aims = self.rank(problem, self.aims)
            self.ranking.append(aims[: len(part)])
            found = problem.found.take(torch.arange(len(part), device=self.x.device))
            for i, count in enumerate((found.forwards, found.backwards, found.queries)):
                self.cost[i, part, 0] += count
            self.spent += int(found.forwards.sum() + found.backwards.sum())
            yield
        self.ranked = torch.cat(self.ranking) if self.ranking else None

    def problem(self, example: Tensor, number: Tensor) -> Problem:
        """The rows of these numbers of these examples, nothing found yet."""
        x0 = self.x[example]
        if self.targets is not None:
            goal = Goal.attain(self.targets[example], reject=self.reject, confidence=self.confidence)
        else:
            aim = None if self.ranked is None else self.ranked[example, number % self.aims]
            goal = Goal.leave(self.y[example], aim, reject=self.reject, confidence=self.confidence)
        restart, eps = number // max(self.aims, 1), self.eps[example]
        key = streams.derive(self.key[example], restart)
        warm = None
        if self.start is not None:
            warm, outside = self.start[example].to(x0), getattr(self.attack, "outside", False)
            warm = (
                warm.clamp(*self.threat.box) if outside else self.threat.region.project(warm, x0, eps, self.threat.box)
            )
            # the same start again would be the same try again
            if not outside and bool((restart > 0).any()) and bool(eps.isfinite().all()):
                own = self.threat.region.start(x0, eps, self.threat.box, key)
                warm = torch.where(per_row(restart > 0, x0), own, warm)
        return Problem(self.target, self.threat, x0, eps, goal, key, example, number, restart, Findings.none(x0), warm)

    def _padded(self, problem: Problem) -> Problem:
        """Fill up to the physical batch with settled copies of the last row: every pass has the same shape."""
        rows = len(problem)
        index = torch.arange(self.batch, device=self.x.device).clamp_max(rows - 1)
        padded = problem.take(index)
        padded.found.settled[rows:] = True
        return padded

    def _run_wave(self) -> Iterator[bool]:
        """Run the wave's rows to their end; pauses after each batch's step. True: rows have been merged into their examples."""
        wave = self.wave
        while wave is not None and wave.batches and wave.k <= self.attack.steps:
            while wave.at < len(wave.batches):
                with wave.quiet:
                    wave.batches[wave.at] = self._step(*wave.batches[wave.at], wave.k)
                wave.at += 1
                yield False
            wave.k, wave.at = wave.k + 1, 0
            live = 0
            for p, _ in wave.batches:
                if self.rows > 1:
                    p.found.settled |= p.number > self.answer[p.example]  # a lower row has answered meanwhile
                live += int((~p.found.settled).sum())
            if live == 0:
                break
            fewer = -(-live // self.batch) < len(wave.batches)
            if fewer or (len(wave.batches) > 1 and wave.batches[0][1].demand is not None):
                wave.batches = self._compact(wave.batches)
            if fewer:
                yield True
        for p, _ in wave.batches if wave is not None else ():
            self._collect(p)
        self.wave = None
        yield True

    def _step(self, p: Problem, s: Any, k: int) -> tuple[Problem, Any]:
        """The k-th unit of work of one batch; after the last one, a look at the iterate that it left."""
        if s is None:
            s = self.attack.init(p)
        if k < self.attack.steps:
            s = self.attack.step(p, s, k)
            self._note(p, k)
            self._settle(p, s.done)
            return p, s
        if not bool(p.found.settled.all()):
            p.look(s.x, getattr(self.attack, "objective", None))
            self._note(p, k)
        self._settle(p, torch.ones_like(p.found.settled))
        return p, s

    def _note(self, problem: Problem, k: int) -> None:
        if self.trace is not None:
            live = ~problem.found.settled
            self.trace[problem.example[live], problem.number[live], k] = problem.found.last[live]

    def _settle(self, problem: Problem, done: Tensor | None) -> None:
        """Freeze the rows that are through: successful (if that ends them), or done."""
        found = problem.found
        if done is not None:
            found.settled |= done
        if self.target.queries is not None:
            found.settled |= found.queries + self.target.average > self.target.queries
        if self.stop is Stop.SUCCESS:
            found.settled |= found.clear
            # the padding repeats a live row's numbers but never holds a success, so plain minima are right
            self.answer.scatter_reduce_(0, problem.example[found.clear], problem.number[found.clear], "amin")

    def _compact(self, pairs: list) -> list:
        """Drop settled rows and close the ranks: as few full batches as the live rows need, rows of like demand together,
        because a batch pays for its most demanding row."""
        kept_problems, kept_states = [], []
        for p, s in pairs:
            self._collect(p)
            live = (~p.found.settled).nonzero().squeeze(1)
            kept_problems.append(p.take(live))
            kept_states.append(s.take(live))
        problem = type(kept_problems[0]).join(kept_problems)
        state = type(kept_states[0]).join(kept_states)
        if state.demand is not None:
            order = state.demand.argsort(stable=True)
            problem, state = problem.take(order), state.take(order)
        packed = []
        for index in torch.arange(len(problem), device=self.x.device).split(self.batch):
            fill = torch.arange(self.batch, device=self.x.device).clamp_max(len(index) - 1)
            packed.append((self._padded(problem.take(index)), state.take(index[fill])))
        return packed

    def _collect(self, problem: Problem) -> None:
        """Merge rows that have settled into their examples; padding and rows collected before are skipped."""
        e, n = problem.example, problem.number
        # padding repeats the last row and is settled from the start: only the first of a run speaks for the row
        own = torch.ones_like(problem.found.settled)
        own[1:] = (e[1:] != e[:-1]) | (n[1:] != n[:-1])
        new = own & problem.found.settled & ~self.finished[e, n]
        for number in n[new].unique().tolist():  # of one number there is at most one row per example
            self._merge(problem.take((new & (n == number)).nonzero().squeeze(1)), number)

    def _merge(self, p: Problem, number: int) -> None:
        e, found = p.example, p.found
        self.finished[e, number] = True
        self.error[e] |= found.error
        for i, count in enumerate((found.forwards, found.backwards, found.queries)):
            self.cost[i, e, number] += count
        self.spent += int(found.forwards.sum() + found.backwards.sum())
        earlier = number < self.owner[e]
        closer = (found.score > self.score[e]) | ((found.score == self.score[e]) & earlier)
        # among successes the row that ended the search answers; without one, where all had their whole budget, the best
        preferred = (number == self.answer[e]) | ((self.owner[e] != self.answer[e]) & closer)
        better = torch.where(found.met, ~self.success[e] | preferred, ~self.success[e] & closer)
        e, found = e[better], found.take(better.nonzero().squeeze(1))
        self.best[e], self.success[e] = found.x, found.met
        self.score[e], self.margin[e] = found.score, found.margin
        self.owner[e] = number

    def _finalise(self) -> Tensor:
        """Examples whose answer can no longer change and has not been reported."""
        needed = torch.arange(self.rows, device=self.x.device) <= self.answer.unsqueeze(1)
        final = (self.finished | ~needed).all(1) & ~self.emitted
        self.emitted |= final
        return final.nonzero().squeeze(1)

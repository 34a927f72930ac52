"""Where an attack gets its gradients from: what is tried when the model's own are suspect, and what won.

The defense, not the attack, decides which gradients work. So before anything else runs, the candidates are tried with one
short attack on a few examples, and the best one guides the whole plan.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from mohs import defenses, records, streams
from mohs.attacks import APGD, SPGD, Attack, HotFlip, LaVAN, attack
from mohs.errors import FAILURES, gist
from mohs.evaluation import _layers
from mohs.evaluation._draws import draws_needed
from mohs.evaluation._fits import fitted
from mohs.evaluation.checks._probe import Probe
from mohs.gradients import BeforeSoftmax, FiniteDifference, Past, Smooth, Straight, Through
from mohs.regions import L0, L1, Linf, Patch, Words
from mohs.target import classify
from mohs.threat import Threat

ROWS = 32
"""Examples a tactic is tried on."""
STEPS = 15
DRAWS = 20
"""Fresh evaluations that score a random model where the threat does not say."""
ENOUGH = 0.9
"""Share of the examples at which nothing better is looked for."""
CLEARLY = 2
"""By how many more broken examples a tactic must win over the gradients as they are."""
AFTER = 16
"""Of the examples that the best tactic leaves, so many judge whether a dearer one is worth its price."""
ALIKE = 1e-3
"""Tactics whose gradients differ by no more than this share of their length, wherever they were looked at, are one."""


@dataclass(frozen=True)
class Tactic:
    """One way to get gradients: what makes the guide of a model (None: its own gradients do), and how many evaluations are
    averaged (None: as usual)."""

    name: str
    make: Callable[[nn.Module], nn.Module] | None = None
    average: int | None = None
    against: str = ""

    def guide(self, model: nn.Module) -> nn.Module | None:
        """The guide of this model, or of another with the same layers by the same names."""
        return None if self.make is None else self.make(model)


PLAIN = Tactic("gradients as they are")


@dataclass(frozen=True)
class Trial:
    """What a tactic broke of the ``n`` examples it was tried on, the mean margin that was left, and the passes it took.

    ``left`` are the examples it did not break, ``each`` the passes of one that took all steps; ``after`` names the tactic whose
    ``left`` it was tried on (empty: on all).
    """

    tactic: Tactic
    broken: int
    n: int
    margin: float
    passes: int
    error: str = ""
    left: tuple[int, ...] = ()
    each: float = 0.0
    after: str = ""
    steps: int = STEPS

    @property
    def rank(self) -> tuple[int, float]:
        """More broken first, then nearer to breaking."""
        return self.broken, self.margin


@dataclass(frozen=True)
class Choice:
    """The tactic that guides the plan, and every trial that led to it (none: nothing was suspect).

    ``second``: other gradients, for one more attack on the examples that the plan does not break.
    """

    tactic: Tactic
    trials: tuple[Trial, ...] = ()
    second: Tactic | None = None


def choose(
    probe: Probe, findings: Sequence[records.Finding], threat: Threat, seed: int, batch: int, *, believe: bool = True,
    suspicious: bool = False,
) -> Choice:  # fmt: skip
    """Try what may give better gradients, if anything is suspect, and take the best.

    Args:
        probe: the model and a sample of the data.
        findings: of the checks: 'no-gradient', 'zero-gradient', 'gradient-promise' and 'randomness' make the model suspect.
        threat: with a finite radius.
        seed, batch: of the trials.
        believe: use what defenses declare; False: find out.
        suspicious: something else makes the model suspect, so that its gradients are not to be trusted whatever they promise.

    Cost: nothing where nothing is suspect; else about 30 passes for each of 32 examples and each tactic, of which there are
    two to about fifteen; where none of them breaks nine tenths, some hundred passes more for each of up to 16 that are left: gradients
    averaged over noise, finite differences where nothing else helps, and as many of the best so far beside them.
    """
    said = defenses.declared(probe.model) if believe else None
    suspect = {f.id for f in findings if f.severity in ("warn", "block")} & {
        "no-gradient", "zero-gradient", "gradient-promise", "output-type"
    }  # fmt: skip
    suspect |= {"gradient-promise"} if suspicious else set()
    if not suspect and not probe.random and (said is None or not said.defenses):
        return Choice(PLAIN)
    right = (probe.logits.argmax(1) == probe.y).nonzero().squeeze(1)[:ROWS]
    if not len(right):
        return Choice(PLAIN)
    x, y = probe.x[right], probe.y[right]
    average = draws_needed(probe, None if said is None else said.guide)[0] if probe.random else None

    def tried(tactic: Tactic, after: Trial | None = None, steps: int = STEPS) -> Trial:
        rows = range(len(x)) if after is None else after.left[:AFTER]
        at = torch.tensor(rows, dtype=torch.int64, device=x.device)
        found = trial(tactic, probe.model, x[at], y[at], threat, seed, batch, probe.reject, steps)
        found = replace(
            found, left=tuple(rows[i] for i in found.left), after="" if after is None else after.tactic.name
        )
        trials.append(found)
        return found

    trials: list[Trial] = []
    known = _Known(probe, x, threat, batch, exact=average is None)
    known.adds(PLAIN)
    tried(PLAIN if average is None else Tactic("gradients as they are", None, 1))
    try:
        for tactic in _candidates(probe, suspect, said, average):  # one by one: what is not needed is not made
            if known.adds(tactic) and tried(tactic).broken >= ENOUGH * len(x):
                break
    except FAILURES as error:
        trials.append(Trial(Tactic("layer by layer"), 0, len(x), -math.inf, 0, gist(error), tuple(range(len(x)))))
    best, second = _best(trials), None
    nothing = min(trials[0].broken + CLEARLY, len(x) // 2)
    if suspect and best.broken < ENOUGH * len(x):
        sigma = spread(threat, x)
        best, second = _dearer(Tactic(_joined(best.tactic, "smoothed"), _smoothed(best.tactic, sigma), 1), best, tried)
        if not best.after and best.broken < nothing:
            around = partial(FiniteDifference, sigma=sigma, draws=24)
            best, other = _dearer(Tactic("finite differences", around, 1), best, tried)
            second = other or second
    if second is None and not best.after:
        second = _passed_over(trials, best)
    return Choice(best.tactic, tuple(trials), second)


def _dearer(tactic: Tactic, best: Trial, tried: Callable[..., Trial]) -> tuple[Trial, Tactic | None]:
    """Is the tactic worth its price? It is tried on what the best one leaves, beside the best one with steps for the same price.

    Answers what guides the plan, and what is left for those whom the plan does not break. A tactic that adds more than the best
    one broke, and clearly more than the further steps, guides the plan, and the one that was best is left for the others; one
    that adds less is left for the others itself, unless the further steps add clearly more than it does.
    """
    if best.error:  # what cannot run guides no plan, and left nothing to others
        dear = tried(tactic)
        return (best if dear.error else dear), None
    dear = tried(tactic, best)
    each = len(best.left) / dear.n  # examples that one of those it was tried on stands for
    if dear.broken * each < CLEARLY:
        return best, None
    steps = max(round(STEPS * dear.each / max(best.each, 1)), STEPS)
    longer = tried(replace(best.tactic, name=f"{best.tactic.name}, {steps} steps"), best, steps).broken
    more = (dear.broken - longer) * each
    if dear.broken * each > best.broken and more >= CLEARLY:
        return dear, best.tactic if best.broken else None
    return best, None if -more >= CLEARLY else tactic


class _Known:
    """The gradients of the tactics so far, at the same points; ``exact``: those of a model that is not random, of which equal ones
    need no second trial.

    The points are the inputs, random ones of the region, and those where a step along the model's own gradient leads: what is equal
    at the data may differ where an attack goes. Three forwards and backwards per example and tactic, where a trial takes about thirty.
    """

    def __init__(self, probe: Probe, x: Tensor, threat: Threat, batch: int, exact: bool) -> None:
        self.model, self.batch = probe.model, batch
        self.exact = exact and not isinstance(threat.region, L0 | Patch | Words)
        self.slopes: list[Tensor] = []
        self.points = [x]
        if self.exact:
            eps, key = x.new_full((len(x),), threat.region.eps), streams.content_keys(x)
            self.points.append(threat.region.start(x, eps, threat.box, key))
            own = self._slopes(PLAIN)
            if own is not None:
                self.points.append(threat.region.extreme(own[: len(x)].view_as(x), x, eps, threat.box))

    def adds(self, tactic: Tactic) -> bool:
        """Are these gradients other ones than those before? Where they cannot be had like this, the trial will tell."""
        slopes = self._slopes(tactic) if self.exact else None
        if slopes is None:
            return True
        new = not any(self._alike(slopes, other) for other in self.slopes)
        self.slopes.append(slopes)
        return new

    def _slopes(self, tactic: Tactic) -> Tensor | None:
        try:
            guide = tactic.guide(self.model) or self.model
            return torch.cat([self._slope(guide, part) for x in self.points for part in x.split(self.batch)])
        except FAILURES:
            return None

    @staticmethod
    def _slope(guide: nn.Module, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_(True)
            logits = classify(guide, x)
            weights = torch.linspace(1, -1, logits.shape[1], dtype=logits.dtype, device=x.device)
            return torch.autograd.grad((logits * weights).sum(), x)[0].flatten(1)

    @staticmethod
    def _alike(a: Tensor, b: Tensor) -> bool:
        """Everywhere within a small share of their length; where all are zero nothing is known of them."""
        near = (a - b).norm(dim=1) <= ALIKE * torch.minimum(a.norm(dim=1), b.norm(dim=1))
        return bool(near.all()) and bool((a != 0).any())


def _passed_over(trials: Sequence[Trial], best: Trial) -> Tactic | None:
    """What breaks most of the examples that the best tactic left, if any; else what the defense declares, which a few examples
    must not rule out."""
    others = [t for t in trials if not (t is best or t.after or t.error)]
    if not others or not best.left:
        return None
    found = max(others, key=lambda t: len(set(best.left) - set(t.left)))
    if set(best.left) - set(found.left):
        return found.tactic
    return next((t.tactic for t in others if t.tactic.against == "declared"), None)


def _candidates(
    probe: Probe, suspect: set[str], said: defenses.Declaration | None, average: int | None
) -> Iterator[Tactic]:
    model, x = probe.model, probe.x
    if average is not None:
        yield Tactic(f"mean of {average} evaluations", None, average, "stochastic")
    if said is not None and said.guide is not None:
        yield Tactic("as the defense declares", defenses.Honest, average, "declared")
    if "output-type" in suspect:
        yield Tactic("what goes into the softmax", BeforeSoftmax, average, "vanishing")
    if not suspect - {"output-type"}:
        return
    lost = _layers.losing(model, x)
    if lost:
        yield Tactic(f"through {', '.join(lost)}", partial(Through, layers=dict.fromkeys(lost)), average, "shattered")
    bare = [name for name in _layers.bare(model, x) if name not in lost]
    if bare:
        names = [*lost, *bare]
        yield Tactic(f"through {', '.join(names)}", partial(Through, layers=dict.fromkeys(names)), average, "shattered")
    yield Tactic("straight through roundings", Straight, average, "shattered")
    yield Tactic("straight through custom functions", partial(Straight, custom=True), average, "shattered")
    yield Tactic("straight through comparisons", partial(Straight, compare=True), average, "shattered")
    if "no-gradient" in suspect:
        yield Tactic("straight through all that is cut off", partial(Straight, attach=True), average, "shattered")
    for name in _layers.entrances(model, x)[:4]:
        yield Tactic(f"past what comes before {name}", partial(Past, layer=name), average, "shattered")
    for name, make in fitted(model, probe.many_x, threat=probe.threat):
        yield Tactic(name, make, average, "shattered")
    single = all(p.dtype != torch.float64 for p in model.parameters())
    if single and suspect & {"gradient-promise", "zero-gradient"}:
        yield Tactic("in double precision", _Double, average, "vanishing")


def trial(
    tactic: Tactic, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, seed: int, batch: int, reject: int | None = None,
    steps: int = STEPS,
) -> Trial:  # fmt: skip
    """One short attack with the tactic's gradients on the examples; a tactic that cannot run says why."""
    one: Attack = APGD(steps=steps)
    if isinstance(threat.region, Words):
        one = HotFlip(steps=2 * steps)
    elif isinstance(threat.region, L0 | Patch):
        one = SPGD(steps=steps) if isinstance(threat.region, L0) else LaVAN(steps=2 * steps, windows=5)
    everyone = tuple(range(len(x)))
    try:
        out = attack(
            one, model, x, y, threat, guide=tactic.guide(model), average=tactic.average, reject=reject, seed=seed,
            batch=min(batch, len(x)),
        )  # fmt: skip
    except FAILURES as error:
        return Trial(tactic, 0, len(x), -math.inf, 0, gist(error), everyone)
    passes, left = out.forwards + out.backwards, ~out.success
    return Trial(
        tactic, int(out.success.sum()), len(x), float(out.margin.clamp(min=-1e30).mean()), int(passes.sum()),
        left=tuple(left.nonzero().flatten().tolist()), each=float(passes.max()),
    )  # fmt: skip


def _best(trials: Sequence[Trial]) -> Trial:
    """The first, which is the cheapest, that nothing later beats clearly."""
    best = trials[0]
    for other in trials[1:]:
        if (best.error and not other.error) or other.broken >= best.broken + CLEARLY:
            best = other
    return best


def spread(threat: Threat, x: Tensor) -> float:
    """Standard deviation of a noise that is typical for half the radius, in units of the input."""
    region, count = threat.region, x[0].numel()
    width = min(threat.box[1] - threat.box[0], float(x.max() - x.min()) or 1.0)
    if isinstance(region, L0 | Patch | Words):
        return 0.1 * width
    if isinstance(region, Linf):
        return min(region.eps / 2, 0.1 * width)
    even = region.eps / (count if isinstance(region, L1) else count ** (1 / region.p))
    return min(max(even / 2, 0.01 * width), 0.1 * width)


def _smoothed(tactic: Tactic, sigma: float) -> Callable[[nn.Module], nn.Module]:
    return lambda model: Smooth(tactic.guide(model) or model, sigma, 8)


def _joined(tactic: Tactic, word: str) -> str:
    return word if tactic.make is None else f"{tactic.name}, {word}"


class _Double(nn.Module):
    """A copy of a model in double precision, for inputs of any."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.copy = copy.deepcopy(model).double()
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.copy(x.double())


REMEDIED = ("no-gradient", "zero-gradient", "gradient-promise", "randomness", "output-type")
"""Checks whose findings a tactic can answer."""


def remedied(findings: Sequence[records.Finding], choice: Choice) -> list[records.Finding]:
    """The findings after the tactics were tried: what was done about them, and no block where an attack found its way."""
    if not choice.trials:
        return list(findings)
    first, chosen = choice.trials[0], next(t for t in choice.trials if t.tactic is choice.tactic)
    if chosen is first:
        others = sum(t.steps == STEPS and t.tactic not in (choice.tactic, choice.second) for t in choice.trials)
        done = (
            f"Tried: {others} other ways to get gradients; none was worth more than the gradients as they are, which broke "
            f"{first.broken} of {first.n} examples."
        )
    else:
        left = f"the {chosen.n} examples left by gradients {chosen.after}" if chosen.after else f"{chosen.n} examples"
        done = (
            f"Done: all attacks take their gradients {chosen.tactic.name}. That broke {chosen.broken} of {left}; as they are, "
            f"{first.broken} of {first.n}."
        )
    works = bool(chosen.broken) or (not chosen.error and any(t.broken for t in choice.trials))
    mended = []
    for finding in findings:
        if finding.id in REMEDIED and finding.severity in ("warn", "block"):
            severity = "warn" if works or finding.severity == "warn" else "block"
            finding = finding.model_copy(update={"severity": severity, "remedy": f"{done} {finding.remedy}".strip()})
        mended.append(finding)
    return mended


def noted(choice: Choice, second: bool = False) -> list[records.Tactic]:
    """The trials as a record holds them; ``second``: did the choice's other gradients guide an attack on the survivors?"""
    return [
        records.Tactic(
            name=t.tactic.name, against=t.tactic.against, broken=t.broken, n=t.n, passes=t.passes,
            chosen=t.tactic is choice.tactic, second=second and t.tactic is choice.second, after=t.after, steps=t.steps,
            error=t.error,
        )
        for t in choice.trials
    ]  # fmt: skip

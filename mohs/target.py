"""Target: the only door to the model. It enforces the access, counts, and nominates every point that passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mohs.errors import AccessError, DataError, ModelError, gist, rows_text
from mohs.guide import Guide, answers_for, wraps
from mohs.look import Look, View, answers
from mohs.objectives import Objective, margin
from mohs.problem import Goal, Problem
from mohs.threat import Access

CLEAR = 0.95
"""Share of the fresh draws that a point of a random model must win for its row to end there.

Near one half a point often wins by luck, and a row looks at many points. So a row that wins narrowly goes on, and its best point
counts. Nineteen of twenty draws are rarely won by luck where a third of all are lost, and little is left to gain from there on."""

NEVER = 100.0
"""How far, in logits, the rejection that a guide lacks lies below the guide's lowest logit."""


def classify(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Logits [B, K >= 2] of a classifier; one logit z becomes the pair (0, z), whose cross-entropy is the logistic loss.

    Raises:
        ModelError: the model raised, or answered with something that is not one row of logits per input.
    """
    version = None if x.is_inference() else x._version
    try:
        logits = model(x)
    except (torch.OutOfMemoryError, MemoryError, ModelError):
        raise  # a ModelError says by itself what is wrong
    except Exception as error:
        raise ModelError(
            f"The model raised {type(error).__name__} on an input of shape {tuple(x.shape)}, {x.dtype}: {error}. "
            "Check that model and data belong together."
        ) from error
    if version is not None and x._version != version:
        raise ModelError(
            "The model changes its input in place, so the point it judged is not the one it was given. "
            "Let its first layer work on a copy: x = x.clone()."
        )
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        what = f"a {logits.dtype} tensor" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ModelError(
            f"The model answered with {what}. Mohs needs a floating-point tensor of logits [N, K], or one logit [N] or [N, 1]. "
            "Wrap the model in a module that returns just the logits."
        )
    if logits.dim() == 1 and len(logits) == len(x):
        logits = logits.unsqueeze(1)
    if logits.dim() != 2 or len(logits) != len(x) or logits.shape[1] == 0:
        raise ModelError(
            f"The model answered with shape {tuple(logits.shape)} to {len(x)} inputs of shape {tuple(x.shape[1:])}. "
            f"Allowed: [N, K] logits, or one logit [N] or [N, 1] for two classes. Flatten or wrap the model."
        )
    if torch.finfo(logits.dtype).bits > torch.finfo(x.dtype).bits:
        logits = logits.to(x.dtype)  # row tensors have the precision of the inputs
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    return logits


def rounding(logits: Tensor) -> Tensor:
    """How far a margin may move by rounding alone, [B]: a success smaller than this is none.

    Relative to the two highest logits, which decide; a masked class at -1e9 or -inf says nothing about their rounding.
    """
    return logits.topk(2, dim=1).values.abs().amax(1) * (8 * torch.finfo(logits.dtype).eps)


class Target:
    """A model under attack: enforces the access, counts per row, and keeps the best point of every row.

    Args:
        model: the deployed classifier; it alone judges.
        access: what the attack may ask for.
        guide: gives gradients where it differs from the model (a surrogate, a stand-in for a defense). Nominated
            points are then looked at again through the model.
        queries: looks per row that are recorded; None for no limit.
        draws: fresh evaluations that judge a point of a random model (0: deterministic).
        labels: labels or targets of all examples; the first look refuses them where the model has no such class.
        average: evaluations of a random model per look, whose objectives are averaged (expectation over transformation).
    """

    def __init__(
        self,
        model: nn.Module,
        access: Access = Access.GRADIENT,
        guide: nn.Module | None = None,
        queries: int | None = None,
        draws: int = 0,
        labels: Tensor | None = None,
        average: int = 1,
    ) -> None:
        self.model = model
        self.guide = model if guide is None else guide
        self.access = access
        self.queries = queries
        self.draws = draws
        self.average = average
        self.own = wraps(self.guide, model)  # a look at the guide is one at the model
        self.trusted = answers_for(self.guide, model)  # and its answers need no second look
        self.needs = guide.needs if isinstance(guide, Guide) else Access.GRADIENT
        calls = (guide.forwards, guide.backwards) if isinstance(guide, Guide) else (1, 1)
        self.cost = (calls[0] * average, calls[1] * average)
        self.labels = labels
        self.highest = -1 if labels is None or not len(labels) else int(labels.max())
        self.judges = True
        """Are points judged, and the best kept? Not where an attack's last iterate is taken as it is."""

    def linearize(self, problem: Problem, x: Tensor, objective: Objective | None = None) -> View:
        """Look at ``x`` [B, ...] keeping the graph: logits, margin, met, the objective's value and cotangent, ``pull``.

        Cost: one forward; each pull one backward. The objective defaults to the logit margin.
        """
        x, graphs = self._graphs(problem, x)
        logits = [graph.detach() for graph in graphs]
        values, cotangents = zip(*[(objective or margin)(z, problem.goal) for z in logits], strict=True)
        value = _mean(values)
        lead, met = self._nominate(
            problem, x.detach(), logits, value, asked=self.own, passes=self.cost[0], sure=self.trusted
        )
        draws = list(zip(graphs, cotangents, strict=True))
        return View(
            self.access, _mean(logits), lead, met, _mean(cotangents), problem, x, draws, _value=value
        )  # fmt: skip

    def gradient(self, problem: Problem, x: Tensor, objective: Objective) -> Tensor:
        """The gradient of the objective at ``x``, [B, ...]. Cost: one forward, one backward."""
        if self.judges:
            return self.linearize(problem, x, objective).gradient()
        x, graphs = self._graphs(problem, x)
        cotangents = [objective(graph.detach(), problem.goal)[1] for graph in graphs]
        live = ~problem.found.settled
        problem.found.forwards += live * self.cost[0]
        return self.pull(problem, x, graphs, cotangents, live)

    def _graphs(self, problem: Problem, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The input as a leaf, and the logits of each evaluation with their graph."""
        if self.access < self.needs and self.own:
            raise AccessError(
                f"The attack asked for a gradient; the threat grants {self.access.name}. "
                "Use an attack that needs no gradients, or Threat(access=Access.GRADIENT)."
            )
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            graphs = [self._fitting(classify(self.guide, x), problem.goal) for _ in range(self.average)]
        self._known(graphs[0], self.own, problem.goal)
        return x, graphs

    def pull(
        self,
        problem: Problem,
        x: Tensor,
        graphs: list[Tensor],
        cotangents: list[Tensor],
        rows: Tensor,
        keep: bool = False,
    ) -> Tensor:
        """Input gradient [B, ...] of the mean of <logits, cotangent> over the evaluations: one backward, charged to ``rows``."""
        draws = len(cotangents)
        if draws > 1:
            cotangents = [c / draws for c in cotangents]
        try:
            (gradient,) = torch.autograd.grad(graphs, x, cotangents, retain_graph=keep)
        except RuntimeError as error:
            raise ModelError(
                f"The model gives no input gradient ({gist(error)}). Gradient attacks need a differentiable "
                "path from input to logits: remove detach() or no_grad(), or use an attack that needs less access."
            ) from error
        problem.found.backwards += rows * self.cost[1]
        if not math.isfinite(float(gradient.sum())):
            gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        return gradient

    def look(self, problem: Problem, x: Tensor, objective: Objective | None = None) -> Look:
        """Look at ``x`` [B, ...] without gradients. Cost: one forward, one query.

        ``objective`` is what 'best' means where no success is found; the default is the logit margin. Where the threat shows
        nothing of the model (transfer), the guide is looked at instead.
        """
        shown = self.access >= Access.LABEL
        if not shown and self.own:
            raise AccessError(
                "The attack asked for a look at the model; the threat grants none (transfer only). "
                "Use Threat(access=Access.LABEL) or more."
            )
        with torch.no_grad():  # not inference_mode: what a model caches in its forward must stay usable with gradients
            asked, live = self.model if shown else self.guide, ~problem.found.settled
            logits = [_ask(asked, x.detach(), live) for _ in range(self.average)]
            if not shown:
                logits = [self._fitting(z, problem.goal) for z in logits]
        self._known(logits[0], shown or self.own, problem.goal)
        value = None if objective is None else _mean([objective(z, problem.goal)[0] for z in logits])
        lead, met = self._nominate(problem, x.detach(), logits, value, asked=shown, passes=self.average, sure=shown)
        labels = None if len(logits) == 1 else torch.stack([answers(z) for z in logits])
        return Look(self.access, _mean(logits), lead, met, _value=value, _answers=labels)

    def _known(self, logits: Tensor, own: bool, goal: Goal) -> None:
        if goal.reject is not None and goal.reject >= logits.shape[1]:
            raise ModelError(
                f"The rejection was said to be logit {goal.reject}, counted from 0; the {'model' if own else 'guide'} answers with "
                f"{logits.shape[1]} logits. Give reject the index of one of these, or None for a model that never rejects."
            )
        if self.labels is not None and self.highest >= logits.shape[1]:
            _refuse_labels(self.labels, logits.shape[1], "model" if own else "guide")

    def _fitting(self, logits: Tensor, goal: Goal) -> Tensor:
        """The guide's logits, with one for the rejection where the model has it and the guide does not.

        A stand-in that never rejects (the net inside a detector, a surrogate) leads past the classifier alone; what the rejection
        makes of it is for the model to judge.
        """
        if goal.reject is None or self.own or logits.shape[1] > goal.reject:
            return logits
        if logits.shape[1] < goal.reject or bool((goal.reach & (goal.label == goal.reject)).any()):
            raise ModelError(
                f"The guide answers with {logits.shape[1]} logits; the model rejects by logit {goal.reject} from 0. A guide has "
                "the model's classes, and the rejection too where the goal is to be rejected. Give one that has, such as a module "
                "of mohs.gradients around the model."
            )
        # far below all others: it can neither win nor count in a softmax, and has no gradient
        return torch.cat([logits, logits.detach().amin(1, keepdim=True) - NEVER], 1)

    def _same_classes(self, logits: Tensor, judged: Tensor) -> None:
        if judged.shape[1] != logits.shape[1]:
            raise ModelError(
                f"The guide answers with {logits.shape[1]} logits and the model with {judged.shape[1]}, so that it points to other "
                "classes. Give a guide with the model's classes in the model's order; it may lack the rejection only where that is "
                "the model's last logit."
            )

    def _nominate(
        self,
        problem: Problem,
        x: Tensor,
        draws: list[Tensor],
        value: Tensor | None,
        asked: bool,
        passes: int,
        sure: bool,
    ) -> tuple[Tensor, Tensor]:
        """Count the look and keep ``x`` where it beats what the row has; answers (margin, met) of this look, of which
        ``draws`` are the logits.

        ``asked``: was it the model that was looked at? Only that is a query. ``sure``: are the answers the deployed model's?
        """
        found, region, box = problem.found, problem.threat.region, problem.threat.box
        margins = [problem.goal.margin(logits) for logits in draws]
        lead = _mean(margins)
        met = _most([own > 0 for own in margins])
        if bool(met.any()):
            met = _most([own > rounding(logits) for own, logits in zip(margins, draws, strict=True)])
        clear = met
        value = lead if value is None else value
        live = ~found.settled
        if not math.isfinite(float(lead.sum())):
            found.error |= live & ~lead.isfinite()
        if self.queries is not None:
            # a look beyond the limit is not recorded
            live &= found.queries + (len(draws) if asked else 1) <= self.queries
        found.forwards += live * passes
        if asked:
            found.queries += live * len(draws)
        found.last = torch.where(live, value, found.last)
        stands = met
        if self.draws > 0 or not sure:
            wanted = met & live
            if (
                self.draws and not problem.threat.minimum
            ):  # what does not even look better than the row's point is not asked again
                wanted &= ~(found.met & (lead <= found.margin))
            if bool(wanted.any()):
                lead, stands, clear = self._judge(problem, x, draws[0], lead, wanted)
                if self.draws:  # the objective of the few draws that nominated a point says less than the judge's
                    value = torch.where(stands, lead, value)
            else:
                stands = clear = wanted
            met = torch.where(wanted, stands, met)
        if problem.threat.minimum:
            if not bool((met & live).any()):
                return lead, met
            size = region.measure(x, problem.x0)
            score = -size
            better = stands & live & (score > found.score) & (size <= problem.eps * (1 + 1e-5))
        else:
            # a point that meets the goal beats any that does not; among equals the higher objective wins, then the margin
            # (cross-entropy is 0 all over where a model is saturated)
            score = value
            higher = (score > found.score) | ((score == found.score) & (lead > found.margin))
            better = live & ((stands & ~found.met) | ((stands == found.met) & higher))
            if not bool(better.any()):
                return lead, met
            better &= region.contains(x, problem.x0, problem.eps)
        better &= _in_box(x, box)
        if bool(better.all()):
            found.x.copy_(x)
        else:
            rows = better.nonzero().squeeze(1)
            found.x.index_copy_(0, rows, x.index_select(0, rows))
        found.met = found.met | (better & stands)
        found.clear = found.clear | (better & clear)
        found.score = torch.where(better, score, found.score)
        found.margin = torch.where(better, lead, found.margin)
        return lead, met

    def _judge(
        self, problem: Problem, x: Tensor, seen: Tensor, lead: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ask the deployed model about the ``wanted`` points, with fresh draws if it is random; never trust the nominating look.

        Answers (mean margin, met by most draws, met clearly), [B] each. The answers are the evaluation's, not the attacker's:
        they cost forwards, but only one query where the attacker's own look was at a guide (to hand in a candidate is to use
        the model once).
        """
        wins, total = torch.zeros_like(lead), torch.zeros_like(lead)
        looks = max(self.draws, 1)
        # twenty draws of a whole batch for the sake of one row would be most of an attack's cost; the one look at a deterministic
        # model keeps its batch, so that its answers are those of every other look bit by bit
        rows = wanted.nonzero().squeeze(1) if self.draws else torch.arange(len(x), device=x.device)
        points, goal = (x[rows], problem.goal.take(rows)) if self.draws else (x, problem.goal)
        for _ in range(looks):
            with torch.no_grad():
                logits = _ask(self.model, points, wanted[rows])
            self._same_classes(seen, logits)
            fresh = goal.margin(logits)
            wins[rows] += (fresh > rounding(logits)).to(wins.dtype)
            total[rows] += fresh
        problem.found.forwards += wanted * looks
        if not self.own and self.access > Access.NONE:
            problem.found.queries += wanted
        return torch.where(wanted, total / looks, lead), wanted & (wins * 2 > looks), wanted & (wins >= CLEAR * looks)


def _most(flags: Sequence[Tensor]) -> Tensor:
    """What holds in more than half of the draws; of one, itself."""
    return flags[0] if len(flags) == 1 else torch.stack(tuple(flags)).sum(0) * 2 > len(flags)


def _mean(values: Sequence[Tensor]) -> Tensor:
    """The mean over draws; of one, itself."""
    return values[0] if len(values) == 1 else torch.stack(tuple(values)).mean(0)


def _ask(model: nn.Module, x: Tensor, wanted: Tensor) -> Tensor:
    """Logits [B, K]; a model that is paid by the row (``by_row``) is not asked about others than ``wanted`` [B]."""
    if not getattr(model, "by_row", False) or bool(wanted.all()):
        return classify(model, x)
    rows = wanted.nonzero().squeeze(1)
    if not len(rows):
        rows = torch.zeros(
            1, dtype=torch.int64, device=x.device
        )  # how many classes there are is known from an answer alone
    asked = classify(model, x.index_select(0, rows))
    return asked.new_zeros((len(x), asked.shape[1])).index_copy_(0, rows, asked)


def _refuse_labels(labels: Tensor, classes: int, whose: str) -> None:
    high = (labels >= classes).nonzero().flatten().tolist()
    raise DataError(
        f"Labels and targets must be below the {whose}'s {classes} classes; {rows_text(high)} reach up to "
        f"{int(labels.max())}. Check that {whose} and data belong together."
    )


def _in_box(x: Tensor, box: tuple[float, float]) -> Tensor:
    if math.isinf(box[0]) and math.isinf(box[1]):
        return x.flatten(1).isfinite().all(1)
    flat = x.flatten(1)
    return (flat.amin(1) >= box[0]) & (flat.amax(1) <= box[1])  # torch.aminmax takes three times as long

"""JSMA: one or two features per step by the saliency map of the Jacobian."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from mohs.attacks._base import State
from mohs.attacks._settings import check_share, check_whole
from mohs.attacks._sparse import geometry, least, tighten
from mohs.errors import UsageError
from mohs.objectives import margin
from mohs.problem import Problem
from mohs.regions import per_row
from mohs.threat import Access


@dataclass(kw_only=True)
class JSMAState(State):
    """``mean`` [B, ...]: the averaged gradient of the polish; ``polished`` [B]: its looks so far, -1 before a success."""

    mean: Tensor
    polished: Tensor


@dataclass(frozen=True)
class JSMA:
    """A few features to their bounds, two per step, chosen where they raise one class and lower its rivals.

    With t the class to raise and z the logits, every change s of one feature (up or down by ``step_size``) or pair of them has

        a = sum s * dz_t/dx_i,    b = sum s * dz_r/dx_i,    r = strongest rival, or the sum of all other classes
        x = clip(x + argmax  a * |b|),   over those with a > 0 and b < 0

    until the goal is met. Native where a class is to be reached; to leave one, t is the strongest rival at each step. The
    best pair is exact and needs no table of all pairs: a change that two others beat in both a and -b is in none, so one
    sort and two running maxima leave a few dozen candidates (memory O(batch x (inputs + candidates^2))).

    Once met, up to ``polish`` further looks search on fewer positions (see ``SigmaZero``). Good for tabular and other data
    with few features, and where a changed feature should go one way; it is greedy and spends two backwards per step, so
    SigmaZero finds smaller changes on images. It ends without success where no change has a > 0 and b < 0.

    Args:
        steps: looks with a gradient, of both phases.
        step_size: change of a feature, in box widths; 1 goes to the bound. Below 1 a feature may be chosen again.
        pairs: change two features per step, else one.
        increase, decrease: the directions allowed; a feature once moved keeps its direction.
        all_rivals: lower the sum of all other classes, as in the paper, not the strongest one: it ends at larger changes.
        polish: looks on fewer positions after the first success; 0: the paper's algorithm.

    Cost per step: 1 forward, 2 backwards (1 for two classes); of the polish 1 and 1. At most steps + 1 forwards.

    >>> import mohs, torch
    >>> net = torch.nn.Linear(3, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 0.0, 0.2], [0.0, 1.0, 0.0]]))
    >>> out = mohs.attack(JSMA(), net, torch.tensor([[0.9, 0.4, 0.5]]), torch.tensor([0]), "l0:inf")
    >>> bool(out.success), float(out.size)
    (True, 1.0)

    **Differs from the paper**: logits for probabilities, whose other classes sum to minus the first and saturate (with two
    classes b is -a, as for probabilities); both directions at once; the strongest rival alone (``all_rivals=True,
    decrease=False, polish=0`` is the paper's); the polish; goals to leave a class. Features are chosen one by one also where
    a position has several channels. One library moves its first feature where no pair qualifies; here the row ends.
    **Source**: N. Papernot, P. McDaniel, S. Jha, M. Fredrikson, Z. B. Celik, A. Swami, "The limitations of deep learning in
    adversarial settings", EuroS&P 2016, algorithms 2 and 3, equations 8 to 10; N. Papernot, P. McDaniel, X. Wu, S. Jha, A.
    Swami, "Distillation as a defense to adversarial perturbations against deep neural networks", S&P 2016, section II.
    """

    steps: int = 200
    step_size: float = 1.0
    pairs: bool = True
    increase: bool = True
    decrease: bool = True
    all_rivals: bool = False
    polish: int = 40
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = False
    random: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("l0",)

    def __post_init__(self) -> None:
        check_whole(self, "steps")
        check_whole(self, "polish", least=0)
        check_share(self, "step_size")
        if not (self.increase or self.decrease):
            raise UsageError("JSMA may neither increase nor decrease a feature. Allow at least one of the two.")

    def init(self, problem: Problem) -> JSMAState:
        """At the clean input."""
        geometry(problem)
        x = problem.begin()
        return JSMAState(x=x, mean=torch.zeros_like(x), polished=torch.full_like(problem.goal.label, -1))

    def step(self, problem: Problem, state: JSMAState, k: int) -> JSMAState:
        """The best pair of features; after a success, a try on fewer positions."""
        view = problem.linearize(state.x, margin)
        polished = torch.where(problem.found.met, state.polished + 1, -1)
        greedy = polished < 0
        raised, lowered = (c.unsqueeze(1) for c in problem.goal.contest(view.logits))
        target = torch.zeros_like(view.logits).scatter_(1, raised, 1.0)
        rivals = 1 - target if self.all_rivals else torch.zeros_like(target).scatter_(1, lowered, 1.0)
        pair = (
            view.logits.shape[1] == 2
        )  # where only the difference of logits means something: a one-logit model has no other
        seeking = greedy & ~problem.found.settled
        busy = bool(seeking.any())
        # a row needs the gradients of both sums while it seeks, and that of their margin afterwards
        g = view.pull(torch.where(greedy.unsqueeze(1) & (not pair), target, view.cotangent), keep=busy and not pair)
        x, mean, lost = state.x, state.mean, torch.zeros_like(greedy)
        if busy:
            x, lost = self._salient(problem, x, g, -g if pair else view.pull(rivals, rows=seeking))
        if not bool(seeking.all()):
            fewer, average = tighten(problem, g, mean)
            x = torch.where(per_row(greedy, x), x, fewer)
            mean = torch.where(per_row(greedy, x), mean, average)
        done = least(problem) | (polished >= self.polish) | (greedy & lost)
        return replace(state, x=x, done=done, mean=mean, polished=polished)

    def _salient(self, problem: Problem, x: Tensor, target: Tensor, rivals: Tensor) -> tuple[Tensor, Tensor]:
        """(x with the most salient features moved, whether there were none [B]): algorithm 3."""
        _, width = geometry(problem)
        low, high = problem.threat.box
        flat, clean, a, b = (v.flatten(1) for v in (x, problem.x0, target, rivals))
        count = flat.shape[1]
        scale = torch.maximum(a.abs().amax(1), b.abs().amax(1)).clamp_min_(torch.finfo(x.dtype).tiny).unsqueeze(1)
        a, b = a / scale, b / scale
        up = (flat < high) & (flat >= clean) if self.increase else torch.zeros_like(flat, dtype=torch.bool)
        down = (flat > low) & (flat <= clean) if self.decrease else torch.zeros_like(up)
        free = torch.cat([up, down], 1)  # every feature twice: as moved up, and as moved down
        gain = torch.cat([a, -a], 1).masked_fill_(~free, -math.inf)
        fall = torch.cat([-b, b], 1).masked_fill_(~free, -math.inf)
        if self.pairs:
            saliency, chosen = _best_pair(gain, fall)
        else:
            saliency, chosen = torch.where((gain > 0) & (fall > 0), gain * fall, 0.0).max(1, keepdim=True)
        lost = saliency.squeeze(1) <= 0
        step = torch.where(chosen < count, self.step_size * width, -self.step_size * width).to(x.dtype)
        moved = flat.scatter_add(1, chosen % count, step.masked_fill_(lost.unsqueeze(1), 0.0))
        return moved.clamp_(low, high).view_as(x), lost


def _best_pair(gain: Tensor, fall: Tensor) -> tuple[Tensor, Tensor]:
    """Largest (gain_p + gain_q) * (fall_p + fall_q) with both sums positive: (value [B, 1], indices [B, 2]); 0 for none.

    A change with two others at least as good in both terms can be replaced in any pair by one of them. In order of falling
    gain, those are the ones whose fall does not exceed the second largest fall before them.
    """
    gain, order = gain.sort(dim=1, descending=True, stable=True)
    fall = fall.gather(1, order)
    first = pad(fall.cummax(1).values, (1, -1), value=-math.inf)
    second = pad(torch.minimum(fall, first).cummax(1).values, (1, -1), value=-math.inf)
    keep = fall > second
    few = max(2, int(keep.sum(1).amax()))  # wider for a row than it needs, if a batch mate needs it: filled with -inf
    kept = keep.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :few]
    gain, fall = (v.masked_fill(~keep, -math.inf).gather(1, kept) for v in (gain, fall))
    gains, falls = (v.unsqueeze(1) + v.unsqueeze(2) for v in (gain, fall))
    saliency = torch.where((gains > 0) & (falls > 0), gains * falls, 0.0)
    saliency.diagonal(dim1=1, dim2=2).zero_()
    value, at = saliency.flatten(1).max(1, keepdim=True)
    return value, order.gather(1, kept).gather(1, torch.cat([at // few, at % few], 1))

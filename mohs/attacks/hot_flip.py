"""HotFlip: another word where the gradient expects most of it, confirmed by a look."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from mohs.attacks._base import State
from mohs.attacks._settings import check_ascent, check_whole
from mohs.errors import ThreatError
from mohs.objectives import Objective, margin
from mohs.problem import Problem
from mohs.regions import Words, per_row
from mohs.threat import Access


@dataclass(kw_only=True)
class HotFlipState(State):
    """``base`` [B, T]: the words to go on from; ``value`` [B]: their objective; ``order`` [B, width, T]: what to look at in this
    round; ``best`` [B, T] and ``most`` [B]: the best of those seen in it, and its objective."""

    base: Tensor
    value: Tensor
    order: Tensor
    best: Tensor
    most: Tensor


@dataclass(frozen=True)
class HotFlip:
    """Rounds of one gradient and a few looks: rank all changes of one word by the gradient, look at the first ones, keep the best.

        g = grad J(x);   a change of the word at place t to word j promises  <g, x' - x> = g_tj - g_t,present
        look at the ``width`` changes that promise most;   x = the best of them, if it is better than x

    until no change of a round is better. A place that has been changed may change again or back; where the threat allows no
    further place, a change elsewhere undoes one of the others. With a ``width`` of all words at all places a round is exhaustive:
    under 'words:1' the first one finds the best answer there is; under 'words:k', with a width k times as large, the search ends
    where no single change or exchange helps. A promise is a first-order guess from one word to a far one; the looks are what
    counts. Further restarts begin at random words.

    Args:
        steps: looks in all; a round takes width + 1.
        width: changes looked at in a round.
        objective: what to climb.

    Raises:
        ThreatError: another threat than 'words:k'.

    Cost: steps + 1 forwards at most, and a backward for each width + 1 of them.

    >>> import mohs, torch
    >>> from mohs.models.text import NormalisedEmbedding, SentenceCNN, TextClassifier, WordChoices, choices
    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2, bias=False))
    >>> _ = net[1].weight.data.zero_()[1].copy_(torch.tensor([0, 0, 0, 0, 0, 0, -1.0, 2, 3, -1, 4, 0]))
    >>> x = choices(torch.tensor([[2.0, 3.0]]), torch.tensor([[0, 0], [1, 1], [4, 5], [6, 7]]))
    >>> out = mohs.attack(HotFlip(), net, x, torch.tensor([0]), "words:1")
    >>> out.success.tolist(), mohs.models.text.chosen(out.x).tolist()
    ([True], [[2.0, 6.0]])

    **Differs from the paper**: changes are looked at before they are kept; no beam of several sentences; which words may replace one is
    the input's affair, not a rule on part of speech and similarity; words only, no insertions or deletions of letters.
    **Source**: J. Ebrahimi, A. Rao, D. Lowd, D. Dou, "HotFlip: white-box adversarial examples for text classification", ACL 2018, the
    sections on derivatives of operations and on multiple changes.
    """

    steps: int = 100
    width: int = 20
    objective: Objective = margin
    needs: ClassVar[Access] = Access.GRADIENT
    finite: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("words",)
    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ascent(self)
        check_whole(self, "width")

    def init(self, problem: Problem) -> HotFlipState:
        """The clean words, or the caller's; of further restarts random ones."""
        region = geometry(problem)
        x = problem.begin()
        if problem.warm is None:
            x = torch.where(per_row(problem.restart > 0, x), problem.start(), x)
        base, low = region.picked(x), torch.full_like(problem.x0[:, 0, 0, 0], -math.inf)
        order = base.unsqueeze(1).repeat(1, self._width(problem), 1)
        return HotFlipState(x=x, base=base, value=low, order=order, best=base.clone(), most=low.clone())

    def _width(self, problem: Problem) -> int:
        """As many as there can be at most, the same for all rows."""
        _, _, places, words = problem.x0.shape
        limit = problem.threat.region.eps
        return min(self.width, places * words * (max(int(limit), 1) if limit < places else 1))

    def step(self, problem: Problem, state: HotFlipState, k: int) -> HotFlipState:
        """Rank the changes, or look at one of them."""
        region, width = geometry(problem), self._width(problem)
        turn = k % (width + 1)
        if turn == 0:
            view = problem.linearize(state.x, self.objective)
            order = ranked(region, view.gradient(), state.base, problem, width)
            value = view.value
            return replace(
                state, x=region.at(order[:, 0], problem.x0), value=value, order=order, best=state.base.clone(), most=value.clone()
            )  # fmt: skip
        seen = state.order[:, turn - 1]
        value = problem.look(state.x, self.objective).value
        better = value > state.most
        best = torch.where(better.unsqueeze(1), seen, state.best)
        most = torch.where(better, value, state.most)
        if turn < width:
            return replace(state, x=region.at(state.order[:, turn], problem.x0), best=best, most=most)
        return replace(
            state, x=region.at(best, problem.x0), base=best, best=best.clone(), most=most, done=most <= state.value
        )  # fmt: skip


def geometry(problem: Problem) -> Words:
    """The region, or a ThreatError where it counts no words."""
    region = problem.threat.region
    if not isinstance(region, Words):
        raise ThreatError(f"This attack changes words; got the threat {problem.threat}. Allowed: such as 'words:2'.")
    region.refuse(problem.x0)
    return region


def ranked(region: Words, g: Tensor, base: Tensor, problem: Problem, width: int) -> Tensor:
    """The ``width`` sentences one change away from ``base`` [B, T] that promise most along ``g``, int64 [B, width, T]; ``base`` itself
    where there are no more."""
    x0, limit = problem.x0, problem.eps
    gains, clean = region.gains(g, x0), region.picked(x0)
    places, words = gains.shape[1:]
    present = gains.gather(2, base.unsqueeze(2))
    promise = (gains - present).scatter(2, base.unsqueeze(2), -math.inf)
    changed = base != clean
    # where no further place may change, a change elsewhere undoes another one: each of them in turn, from the cheapest on
    full, cost = changed.sum(1) >= limit, present.squeeze(2).masked_fill(~changed, math.inf)
    most = max(int((changed & full.unsqueeze(1)).sum(1).amax()), 1) if len(base) else 1
    cost, undone = (v[:, :most] for v in cost.sort(dim=1, stable=True))
    elsewhere = (full.unsqueeze(1) & ~changed).view(-1, 1, places, 1)
    exchanged = promise.unsqueeze(1) - cost.view(-1, most, 1, 1)  # -inf where there is nothing to undo
    promise = torch.where(elsewhere, exchanged, promise.unsqueeze(1))
    promise[:, 1:].masked_fill_(~elsewhere, -math.inf)  # the same changes once more
    # stable: among equals the first, however many exchanges the rows beside this one ask for
    worth, index = (v[:, :width] for v in promise.flatten(1).sort(dim=1, descending=True, stable=True))
    worth = pad(worth, (0, width - worth.shape[1]), value=-math.inf)
    index = pad(index, (0, width - index.shape[1]))
    turn, place, word = index // (places * words), index // words % places, index % words
    order = base.unsqueeze(1).repeat(1, width, 1)
    back = undone.gather(1, turn).unsqueeze(2)
    exchange = (full.unsqueeze(1) & ~changed.gather(1, place)).unsqueeze(2)
    order = torch.where(exchange, order.scatter(2, back, clean.gather(1, back.squeeze(2)).unsqueeze(2)), order)
    order = order.scatter(2, place.unsqueeze(2), word.unsqueeze(2))
    return torch.where(worth.isfinite().unsqueeze(2), order, base.unsqueeze(1))

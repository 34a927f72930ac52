"""Looks at the model: what one shows, and how it is differentiated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from mohs.errors import AccessError
from mohs.threat import Access

if TYPE_CHECKING:
    from mohs.problem import Problem


def answers(logits: Tensor) -> Tensor:
    """The class of the highest logit, [B]; -1 where any is nan, as argmax would call nan a class.

    >>> answers(Tensor([[0.0, 1.0], [float("nan"), 1.0]])).tolist()
    [1, -1]
    """
    return logits.argmax(1).masked_fill_(logits.isnan().any(1), -1)


@dataclass
class Look:
    """What one look shows: as much as the access grants.

    Args:
        access: the level granted; a property above it raises AccessError.
    """

    access: Access
    _logits: Tensor
    _margin: Tensor
    met: Tensor
    _value: Tensor | None = field(default=None, kw_only=True)
    _answers: Tensor | None = field(default=None, kw_only=True)  # of each draw, [draws, B]

    def _grant(self, level: Access, what: str) -> None:
        if self.access < level:
            raise AccessError(
                f"The attack asked for {what}, which needs access {level.name}; the threat grants {self.access.name}. "
                f"Use an attack that needs no more, or Threat(access=Access.{level.name})."
            )

    @property
    def label(self) -> Tensor:
        """The model's answer, [B], the most frequent one of several draws; -1 where it is no number."""
        self._grant(Access.LABEL, "labels")
        return answers(self._logits) if self._answers is None else self._answers.mode(0).values

    @property
    def probabilities(self) -> Tensor:
        """Softmax of the logits, [B, K]."""
        self._grant(Access.SCORE, "probabilities")
        return self._logits.softmax(1)

    @property
    def logits(self) -> Tensor:
        """Logits, [B, K]."""
        self._grant(Access.LOGIT, "logits")
        return self._logits

    @property
    def margin(self) -> Tensor:
        """By how much the goal is met, [B]."""
        self._grant(Access.LOGIT, "logits")
        return self._margin

    @property
    def value(self) -> Tensor:
        """The objective asked for, from the logits, [B]; the margin where none was."""
        self._grant(Access.LOGIT, "logits")
        return self._margin if self._value is None else self._value


@dataclass
class View(Look):
    """A look that can be differentiated: ``pull`` maps cotangents of the logits to gradients of the input."""

    cotangent: Tensor
    _problem: Problem
    _x: Tensor
    _draws: list[tuple[Tensor, Tensor]]  # of each draw: the logits with their graph, the cotangent of its own objective

    @property
    def value(self) -> Tensor:
        """The objective at what gives the gradients, which may be a guide that shows more than the model, [B]."""
        return self._margin if self._value is None else self._value

    def gradient(self, keep: bool = False) -> Tensor:
        """Input gradient [B, ...] of the objective that was asked for: one backward.

        Over several draws it is the gradient of the mean objective, not the objective of the mean logits.
        """
        return self._pull([own for _, own in self._draws], keep, None)

    def pull(self, cotangent: Tensor, keep: bool = False, rows: Tensor | None = None) -> Tensor:
        """Input gradient [B, ...] of <logits, cotangent> per row: one backward. ``keep`` allows another pull.

        ``rows`` [B] says which rows use it: only they are charged.

        Non-finite entries become zero, so that one bad coordinate does not spoil a row.
        """
        return self._pull([cotangent] * len(self._draws), keep, rows)

    def _pull(self, cotangents: list[Tensor], keep: bool, rows: Tensor | None) -> Tensor:
        live = ~self._problem.found.settled
        rows = live if rows is None else rows & live
        return self._problem.target.pull(self._problem, self._x, [z for z, _ in self._draws], cotangents, rows, keep)

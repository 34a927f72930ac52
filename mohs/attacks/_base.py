"""What an attack is: a frozen dataclass with two methods, and the state its rows carry from step to step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from mohs._rows import Rows
from mohs.problem import Problem
from mohs.threat import Access


@dataclass
class State(Rows):
    """What a row carries: ``x`` [B, ...] is the next point to look at; ``done`` [B] (optional) ends a row; ``demand`` [B]
    (optional): how many backwards its next step is likely to ask for, so that rows of like demand share a batch."""

    x: Tensor
    done: Tensor | None = None
    demand: Tensor | None = field(default=None, kw_only=True)


@runtime_checkable
class Attack(Protocol):
    """A row machine: ``init`` makes the state of the rows, ``step`` does the k-th unit of work, the same for all rows.

    It holds no model, no loop, no counters and no success test: the scheduler and the target do. The fields of the
    dataclass are its whole configuration and its repr is its record.

    Attributes:
        steps: how many units of work at most.
        needs: the access it asks for.
        finite: does it need a finite radius?
        random: do restarts differ? (Taken for granted where it is not said.)
        uneven: do its rows differ in how many backwards a step takes, or in how many steps they take where the budget is
            spent? Then smaller batches waste less (taken for no).
        own_step: a method, where a step has one length: that at a threat's radius, in units of the field ``step_size``, of which
            any positive number is then allowed.
        last: does a step do no more than move its iterate, ``state.x``, within region and box by one gradient? Then training may take
            the last one without a look at it, ``Stop.LAST`` (taken for no).
        outside: does it come from outside the region? Then the caller's points are brought into the box alone, and all
            restarts begin there (taken for no).
        norms: the regions it serves, of "linf", "l2", "l1", "lp", "l0", "patch" and "words" (where it is not said: all of them).
    """

    needs: ClassVar[Access]
    finite: ClassVar[bool]

    @property
    def steps(self) -> int:
        """How many units of work at most."""
        ...

    def init(self, problem: Problem) -> Any:
        """The state before the first step."""
        ...

    def step(self, problem: Problem, state: Any, k: int) -> Any:
        """The state after the k-th unit of work."""
        ...

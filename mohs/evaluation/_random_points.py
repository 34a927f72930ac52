"""Random points of the region: what no search at all finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mohs import streams
from mohs.attacks import State
from mohs.problem import Problem
from mohs.threat import Access


@dataclass(frozen=True)
class RandomPoints:
    """Looks at random points, every other one on the border; labels are all it needs.

    Whatever it breaks, any attack should have broken: it tests attacks, not models.

    Args:
        steps: points.

    **Source**: N. Carlini et al., "On evaluating adversarial robustness", 2019, section 5 (random noise as a test of attacks).
    """

    steps: int = 25
    needs: ClassVar[Access] = Access.LABEL
    finite: ClassVar[bool] = True

    def init(self, problem: Problem) -> State:
        """A random point."""
        return State(problem.threat.region.start(problem.x0, problem.eps, problem.threat.box, problem.key))

    def step(self, problem: Problem, state: State, k: int) -> State:
        """A look, and the next point."""
        problem.look(state.x)
        region, key = problem.threat.region, streams.derive(problem.key, k + 1)
        if k % 2:
            return State(region.start(problem.x0, problem.eps, problem.threat.box, key))
        direction = streams.normal(key, tuple(problem.x0.shape[1:]), dtype=problem.x0.dtype)
        return State(region.extreme(direction, problem.x0, problem.eps, problem.threat.box))

"""One batch of the loop, as an objective sees it that does more with it than one gradient and one update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mohs.defenses.training._quiet import seeded
from mohs.defenses.training._world import World
from mohs.defenses.training.objective import Context, Objective

Loss = Callable[[nn.Module, Tensor, Tensor, Context], Tensor]


@dataclass(frozen=True)
class Turn:
    """A batch, and the two things that can be done with it: take a gradient, and update the weights.

    All processes take the same turns, so an objective calls ``gradients``, ``update`` and ``gather`` equally often in
    each of them, whatever its share of the batch.

    Args:
        model: the net, in training mode.
        parameters: those that are trained.
        x, y: this process's rows of the batch, possibly none.
        rows: rows of the whole batch, over all processes.
        context: what the loop offers to a loss.
        memory: what the objective keeps from step to step, tensors by name, the same in every process; it is saved with
            the checkpoint, so that a resumed run goes on as if it had never stopped.
        optimiser, world, seed, fail: the loop's own.
    """

    model: nn.Module
    parameters: list[nn.Parameter]
    x: Tensor
    y: Tensor
    rows: int
    context: Context
    memory: dict[str, Tensor]
    optimiser: torch.optim.Optimizer
    world: World
    seed: tuple[object, ...]
    fail: Callable[[str], Exception]

    def gradients(self, loss: Loss, draw: int = 0) -> float:
        """Fill the parameters' ``grad`` with the gradient of the mean loss over the whole batch; answers that mean.

        Args:
            loss: of this process's rows, their mean.
            draw: the same number gives the same dropout.

        Raises:
            ModelError: The loss is not finite.
        """
        self.optimiser.zero_grad(set_to_none=True)
        total = torch.zeros(1, device=self.world.device)
        with seeded(*self.seed, *([draw] if draw else [])):
            if len(self.x):
                # a share counts by its rows, so that the sum over all processes is the mean over the whole batch
                part = loss(self.model, self.x, self.y, self.context) * (len(self.x) / self.rows)
                part.backward()
                total = part.detach().reshape(1)
        value = float(self.world.sum_gradients(self.parameters, total))
        if not math.isfinite(value):
            raise self.fail(f"the loss became {value}")
        return value

    def update(self) -> None:
        """One step of the optimiser along the gradients."""
        self.optimiser.step()
        self.world.copy_from_main(self.model.buffers())  # batch statistics: one share's stand for all

    def share(self, whole: Tensor) -> Tensor:
        """This process's part of a tensor with one row for each of the whole batch."""
        return self.world.share(whole)

    def gather(self, part: Tensor) -> Tensor:
        """The inverse of ``share``."""
        return self.world.gather(part, self.rows)


def take(objective: Objective, turn: Turn) -> float:
    """What an objective does with a batch, by default one gradient and one update; answers the mean loss."""
    own = getattr(objective, "step", None)
    if callable(own):
        return float(own(turn))
    value = turn.gradients(objective.loss)
    turn.update()
    return value

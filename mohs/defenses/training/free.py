"""Free adversarial training: each batch several times, and one backward for the weights and for the change of the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mohs.defenses._settings import number
from mohs.defenses.training.objective import Context
from mohs.defenses.training.room import NO_BOX
from mohs.defenses.training.turn import Turn
from mohs.target import classify

CARRIED = "free/change"


@dataclass(frozen=True)
class Free:
    """Replay every batch; each backward gives the gradient for the weights and a step for the inputs.

        repeat replays times:   g_w, g_x = gradients of J(x + delta, y)
                                update the weights along g_w
                                delta = project(delta + length * eps * steepest(g_x))

    The change delta goes on to the next batch. An epoch costs ``replays`` of natural training and makes as many updates,
    so give a recipe so many fewer epochs. Many replays lower clean accuracy, because a batch is seen again while the
    weights are still bent towards it; with few the changes are stale. ``Fast`` is cheaper still.

    Args:
        replays: of each batch; the paper's is 8 for CIFAR-10.
        length: of a step of the change, in radii; above 0. The paper's is 1.

    Cost: replays forwards and backwards per example and epoch.

    **Differs from the paper**: any norm. x + delta is clipped to the box, the change that is carried over is not.
    **Source**: A. Shafahi et al., "Adversarial training for free!", NeurIPS 2019, algorithm 1.
    """

    replays: int = 8
    length: float = 1.0
    attack: ClassVar[None] = None
    own_points: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "lp")

    def __post_init__(self) -> None:
        number(self.replays, "replays of Free", 1, whole=True)
        number(self.length, "length of Free, that of its step in radii,", 0, above=True)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """J(x, y) at the points as they are, mean over the batch."""
        return F.cross_entropy(classify(model, x), y)

    def step(self, turn: Turn) -> float:
        """The replays of a batch; answers the mean of their losses."""
        room, x = turn.context.around(self), turn.x
        before = turn.memory.get(CARRIED, x.new_zeros(0, *x.shape[1:]))
        missing = max(turn.rows - len(before), 0)
        whole = torch.cat([before, x.new_zeros(missing, *x.shape[1:])])
        delta, radii, total = turn.share(whole[: turn.rows]), room.radii(x), 0.0
        for replay in range(self.replays):
            points = (x + delta).clamp_(*room.threat.box).requires_grad_(True)

            def loss(model: nn.Module, x: Tensor, y: Tensor, context: Context, points: Tensor = points) -> Tensor:
                return self.loss(model, points, y, context)

            total += turn.gradients(loss, draw=replay)
            turn.update()
            if points.grad is not None:
                clean = torch.zeros_like(x)  # delta stands for itself: the box is not its own
                delta = room.threat.region.advance(delta, points.grad, self.length * radii, clean, radii, NO_BOX)
        turn.memory[CARRIED] = torch.cat([turn.gather(delta), whole[turn.rows :]])
        return total / self.replays

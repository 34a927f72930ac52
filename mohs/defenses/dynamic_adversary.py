"""The adversary that a detector is trained against while both learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mohs._geometry import per_row
from mohs.defenses._settings import number
from mohs.defenses.training.room import odds
from mohs.errors import ThreatError
from mohs.threat import Threat

NORMS = ("linf", "l2", "l1", "lp")


@dataclass(frozen=True, init=False)
class DynamicAdversary:
    """Moves inputs so that the classifier errs and the detector does not notice, by steps that mix both aims.

        x_(n+1) = project(x_n + step_size * ((1 - sigma) steepest(grad J_cls(x_n, y)) + sigma steepest(grad J_det(x_n, 1))))

    J_cls is the classifier's loss at the true class, J_det the detector's at 'adversarial', and steepest the sign in Linf. With
    sigma = 0 it is the iterated sign method, which ignores the detector; with sigma = 1 it ignores the classifier. It serves
    ``BinaryDetector.fit_dynamic``; to attack a defended model, use the attacks, which see the rejection as a logit.

    Args:
        threat: region and box, or their short form such as 'linf:0.1'; of finite radius, no L0 and no patch.
        steps: gradient steps.
        step_size: length of a step in the region's norm, input units; None: 2.5 * eps / steps.

    Raises:
        ThreatError: another threat.
        UsageError: steps or step_size that cannot be.

    Cost: ``steps`` forwards and twice as many backwards per input.

    >>> DynamicAdversary("linf:0.1", steps=4).threat.region
    Linf(eps=0.1)

    **Differs from the paper**: any of these norms; the clean input is where it begins, as there.
    **Source**: J. H. Metzen, T. Genewein, V. Fischer, B. Bischoff, "On detecting adversarial perturbations", ICLR 2017, the section
    on dynamic adversaries.
    """

    threat: Threat
    steps: int = 10
    step_size: float | None = None

    def __init__(self, threat: Threat | str, steps: int = 10, step_size: float | None = None) -> None:
        number(steps, "steps of DynamicAdversary", 1, whole=True)
        if step_size is not None:
            number(step_size, "step_size of DynamicAdversary", 0, above=True)
        parsed = Threat.parse(threat)
        if parsed.minimum or parsed.region.kind not in NORMS:
            raise ThreatError(
                f"DynamicAdversary moves within a ball of finite radius, in one of the norms {', '.join(NORMS)}; got {parsed}. Give a "
                "threat such as 'linf:0.1'."
            )
        for name, value in (("threat", parsed), ("steps", steps), ("step_size", step_size)):
            object.__setattr__(self, name, value)

    def points(self, look: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, y: Tensor, sigma: Tensor) -> Tensor:
        """Where inputs [B, ...] are moved to.

        Args:
            look: from inputs to the classifier's logits [B, K] and the detector's log-odds of 'adversarial' [B].
            x: clean inputs in the box.
            y: their classes [B].
            sigma: the detector's weight for each, [B], from 0 to 1.
        """
        region, box = self.threat.region, self.threat.box
        radii = x.new_full((len(x),), region.eps)
        size = (
            region.default_step(radii, self.steps, box)
            if self.step_size is None
            else torch.full_like(radii, self.step_size)
        )
        point = x
        for _ in range(self.steps):
            with torch.enable_grad():
                place = point.detach().requires_grad_(True)
                logits, score = look(place)
                # the odds grow as the losses do, but their gradient does not vanish where a net is sure
                (wrong,) = torch.autograd.grad(odds(logits, y).sum(), place, retain_graph=True)
                (unseen,) = torch.autograd.grad(-score.sum(), place)
            way = per_row(1 - sigma, x) * region.steepest(wrong) + per_row(sigma, x) * region.steepest(unseen)
            point = region.project(point + per_row(size, x) * way, x, radii, box)
        return point

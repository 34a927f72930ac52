"""Cascade adversarial training: some points come from many steps against a net that is already defended."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mohs.defenses._settings import number
from mohs.defenses.training.objective import Context, Last, Objective, check_attacked
from mohs.defenses.training.pretrained import Pretrained, pretrained

if TYPE_CHECKING:
    from mohs.attacks import Attack


@dataclass(frozen=True)
class Cascade:
    """An adversarial training, some of whose points are made by another attack against a fixed, defended net.

        x' = attack on defended at x        for the share of the rows that is drawn for it, anew for each batch
        x' = what the objective makes       for the others: one step against the net itself
        loss = that of the objective, such as UnifiedEmbedding(FGSM())

    Points of many steps carry over from a defended net to another one trained in the same way, better than from other nets.
    According to the paper it resists many steps better than its one-step training alone, and one step less. It was found not
    to hide gradients, and to be weak against PGD; training against many steps on the net itself (``Saddle``) is the honest way.

    Args:
        objective: holds the one-step attack on the net itself, such as ``UnifiedEmbedding(FGSM())``, the paper's.
        attack: of many steps, such as ``BIM(steps=10)``; run against ``defended``.
        defended: the net of an earlier training of the same kind (without ``Cascade``): ``bundled:NAME``, a ``.safetensors``
            file that names its net, or a module; its hash is part of the recipe.
        share: of the rows, on average, whose points come from ``defended``, in (0, 1]. The paper's is half.

    Cost: that of the objective, and that of ``attack``; both attacks take passes of a whole batch, although each is given only
    some of its rows.

    >>> from mohs.attacks import BIM, FGSM
    >>> from mohs.defenses.training import UnifiedEmbedding
    >>> Cascade(UnifiedEmbedding(FGSM()), BIM(steps=10), "bundled:fashion-pgd").attack.steps
    10

    **Differs from the paper**: rows are drawn one by one, where the paper halves the batch; points are made when they are
    needed, at the row's own radius, where the paper stores them for 16 radii and takes the next larger; any attack and region.
    **Source**: T. Na, J. H. Ko, S. Mukhopadhyay, "Cascade adversarial machine learning regularized with a unified embedding",
    ICLR 2018, cascade adversarial training; shares and radii from the authors' code. Its evaluation: A. Athalye, N. Carlini,
    D. Wagner, "Obfuscated gradients give a false sense of security", ICML 2018.
    """

    objective: Objective
    attack: Attack
    defended: Pretrained | nn.Module | str
    share: float = 0.5

    def __post_init__(self) -> None:
        check_attacked("Cascade", self.objective)
        number(self.share, "share of Cascade, of the rows with points from the defended net,", 0, 1, above=True)
        object.__setattr__(self, "defended", pretrained(self.defended, "defended net of Cascade"))

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """The objective's loss, with some points from the defended net."""
        room, defended = context.around(self), pretrained(self.defended).on(x.device)

        def perturb(
            attack: Attack | Last, x: Tensor, y: Tensor, *, of: nn.Module | None = None, radii: Tensor | None = None
        ) -> Tensor:
            theirs = room.uniform(x) < self.share
            points = x.clone()
            for rows, runs, net in ((~theirs, attack, of), (theirs, Last(self.attack), defended)):
                some = None if radii is None else radii[rows]
                points[rows] = context.perturb(runs, x[rows], y[rows], of=net, radii=some)
            return points

        return self.objective.loss(model, x, y, replace(context, perturb=perturb))

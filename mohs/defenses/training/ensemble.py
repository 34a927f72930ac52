"""Ensemble adversarial training: adversarial points from other, fixed nets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mohs.defenses.training._quiet import evaluating
from mohs.defenses.training.objective import Context, Last, Objective, check_attacked
from mohs.defenses.training.pretrained import Pretrained, pretrained
from mohs.errors import UsageError
from mohs.target import classify

if TYPE_CHECKING:
    from mohs.attacks import Attack


@dataclass(frozen=True)
class Ensemble:
    """Any adversarial training, with the points of each batch made against a net drawn from several: fixed ones and itself.

        h = one of (sources..., net), equally likely, drawn anew for each batch
        x' = attack on h at x        in place of the attack on the net itself
        loss = that of the objective: of Mixture(FGSM())  J(x, y) / 2 + J(x', y) / 2

    A net cannot weaken points that it did not make, so that training against one step does not end in masked gradients as
    easily, and points that come from other nets fool it less. Against an adversary who sees the net itself it is not robust,
    as the paper says: many steps still break it. Judge it so.

    Args:
        objective: holds the attack, such as ``Mixture(FGSM())``, the paper's; it may be wrapped by ``AWP``, and may be a
            ``Cascade``.
        sources: the fixed nets, at least one: ``bundled:NAME``, ``.safetensors`` files that name their net, or modules; their
            hashes are part of the recipe. They are best of other architectures.
        own_labels: attack the class that h gives to x, rather than the true one: a step along the gradient of the true
            class's loss tells the net this class (label leaking).

    Cost: that of the objective; with ``own_labels`` one forward of h more.

    >>> from mohs.attacks import FGSM
    >>> from mohs.defenses.training import Mixture
    >>> training = Ensemble(Mixture(FGSM()), ["bundled:fashion-natural", nn.Linear(784, 10)])
    >>> [source.name for source in training.sources]
    ['bundled:fashion-natural', 'Linear']

    **Differs from the paper**: every net is attacked in eval mode, where the published code leaves dropout on; the loss is that
    of the published code for MNIST (all of a batch clean, all of it adversarial, half and half), where the paper's ImageNet
    runs replace half of a batch; any attack, where the paper has FGSM (MNIST) and the step to the least likely class
    (ImageNet). That the label is the answer of h is as in the published code; its equation 2 has the true one.
    **Source**: F. Tramer, A. Kurakin, N. Papernot, I. Goodfellow, D. Boneh, P. McDaniel, "Ensemble adversarial training:
    attacks and defenses", ICLR 2018, sections 3.4 and 4.2; draws, loss and labels from the authors' code.
    """

    objective: Objective
    sources: tuple[Pretrained | nn.Module | str, ...]
    own_labels: bool = True

    def __post_init__(self) -> None:
        check_attacked("Ensemble", self.objective)
        given = self.sources if isinstance(self.sources, list | tuple) else (self.sources,)
        if not given:
            raise UsageError(
                "Ensemble has no sources; without one it is its objective alone. Give fixed nets, such as "
                "sources=['bundled:fashion-natural']."
            )
        object.__setattr__(self, "sources", tuple(pretrained(net, "source of Ensemble") for net in given))

    @property
    def attack(self) -> Attack | None:
        """The objective's."""
        return self.objective.attack

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """The objective's loss, with points against the net that is drawn for this batch."""
        nets = [*(pretrained(net).on(x.device) for net in self.sources), model]
        drawn = nets[context.around(self).pick(len(nets))]

        def perturb(
            attack: Attack | Last, x: Tensor, y: Tensor, *, of: nn.Module | None = None, radii: Tensor | None = None
        ) -> Tensor:
            net = drawn if of is None else of
            if self.own_labels:
                with evaluating(net), torch.no_grad():
                    y = classify(net, x).argmax(1)
            return context.perturb(attack, x, y, of=net, radii=radii)

        return self.objective.loss(model, x, y, replace(context, perturb=perturb))

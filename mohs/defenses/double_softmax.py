"""Probabilities in place of logits: a negative control."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mohs.defenses._base import Defense
from mohs.guide import instead


@dataclass(frozen=True)
class DoubleSoftmax(Defense):
    """A negative control: answers with probabilities, of which a loss takes a second softmax. **It adds no robustness.**

        z -> softmax(z)

    Where the net is sure, the first softmax rounds to 0 and 1 and has no gradient left. The gradient of the logits
    themselves breaks it.

    Cost: none worth naming.

    >>> DoubleSoftmax()(nn.Identity())(Tensor([[0.0, 0.0]])).tolist()
    [[0.5, 0.5]]

    **Differs from the paper**: it is no published method, but a common mistake.
    **Source**: N. Carlini et al., "On evaluating adversarial robustness", 2019, section 3 (attack the logits); F. Croce,
    M. Hein, "Reliable evaluation of adversarial robustness", ICML 2020, section 4 (vanishing gradients of the cross-entropy).
    """

    def answer(self, model: nn.Module, x: Tensor, guiding: bool) -> Tensor:
        """Probabilities [B, K]."""
        z = model(x)
        value = z.softmax(1)
        return instead(value, z) if guiding and z.requires_grad else value

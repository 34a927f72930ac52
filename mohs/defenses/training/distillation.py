"""Defensive distillation: a net learns another one's answers, both at a high temperature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from mohs.defenses.training.natural import check_temperature
from mohs.defenses.training.objective import Context
from mohs.defenses.training.pretrained import Pretrained, pretrained
from mohs.target import classify


@dataclass(frozen=True)
class Distillation:
    """Cross-entropy between the answers of a teacher and of the net, both with logits divided by a temperature.

        loss = - sum over classes of  softmax(teacher(x) / T) * log softmax(net(x) / T)        (labels play no part)

    The teacher is a net of the same architecture that was itself trained at T: ``Natural(temperature=T)``;
    ``mohs.evaluation.training.distil`` runs both. The net is used as it is, at T = 1, and there lies all of its effect: its
    logits have grown, up to T times, so that the softmax saturates and the gradient of the cross-entropy vanishes in float32.
    Attacks on the logits (margin, DLR), or on logits divided by T, break it as any undefended net: a negative example of
    masked gradients. Mohs's own cross-entropy keeps its direction there; attacks that see probabilities alone do not. At
    T = 1 it is training on soft labels.

    Args:
        teacher: ``bundled:NAME``, a ``.safetensors`` file that names its net, or a module; its hash is part of the recipe.
        temperature: above 0. The paper tries 1 to 100.

    Cost: 2 forwards (one of the teacher), 1 backward per example and epoch.

    >>> import torch
    >>> teacher, x = nn.Identity(), torch.tensor([[4.0, 0.0]])
    >>> soft = Distillation(teacher, 4.0).loss(nn.Identity(), x, None, None)
    >>> round(float(soft), 4)  # the entropy of (e, 1) / (e + 1)
    0.5822

    **Differs from the paper**: the teacher is asked again in each step, in eval mode, where the paper stores its answers. As
    there, the loss is not multiplied by T * T, so that its gradient falls with T: give SGD a larger learning rate (a linear
    net takes the same path, T times as large, at T * T times the rate).
    **Source**: N. Papernot, P. McDaniel, X. Wu, S. Jha, A. Swami, "Distillation as a defense to adversarial perturbations
    against deep neural networks", IEEE S&P 2016, the training procedure of defensive distillation; its break: N. Carlini, D.
    Wagner, "Defensive distillation is not robust to adversarial examples", 2016 (arXiv 1607.04311).
    """

    teacher: Pretrained | nn.Module | str
    temperature: float
    attack: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_temperature(self.temperature, "Distillation")
        object.__setattr__(self, "teacher", pretrained(self.teacher, "teacher of Distillation"))

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context | None = None) -> Tensor:
        """The soft cross-entropy, mean over the batch."""
        soft = (pretrained(self.teacher).answers(x) / self.temperature).softmax(1)
        return F.cross_entropy(classify(model, x) / self.temperature, soft)

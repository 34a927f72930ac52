"""Any objective, on the embedded input of a net in two parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from mohs.defenses.training.objective import Context, Last, Objective, check_inner, prepares
from mohs.errors import ModelError, UsageError

if TYPE_CHECKING:
    from mohs.attacks import Attack


@dataclass(frozen=True)
class OnEmbeddings:
    """Any objective, with the embedded input in the place of the input: for words, which cannot be changed a little.

        e = model.embedding(x);   loss = objective's, of model.classifier at e          r constant, e not

    Region and radius are those of the embedded input, over the whole of it: 'l2:5 in [-inf, inf]' is a change of length 5 of a whole
    sentence. The embedding is trained too: an adversarial point is e + r with r as it was found, so that the loss there reaches the
    words through e. With normalised embeddings (``mohs.models.NormalisedEmbedding``) the net cannot outgrow the radius.

    - ``OnEmbeddings(Mixture(FGSM()))`` in an L2 region is adversarial training of text, r = eps * g / ||g||, g the gradient of
      -log p(y | e): its loss is half the sum of the clean and the adversarial one.
    - ``OnEmbeddings(VAT())`` is virtual adversarial training; ``VAT(unlabelled=K)`` learns from sentences without a label as well.

    It is a regulariser: measure what is left of the answers with ``mohs.evaluate(model.classifier, (model.embedding(ids), y), ...)``,
    and under other words with the threat 'words:k'.

    Args:
        objective: what is minimised at the embedded input.

    Raises:
        UsageError: what is not an objective, one that says by itself what happens to the weights, or one that trains on points made
            beforehand.
        ModelError: at the first step, a net without ``embedding`` and ``classifier``.

    Cost: the objective's; the embedding is looked at once.

    >>> from mohs.defenses.training import VAT
    >>> from mohs.models import NormalisedEmbedding, SentenceCNN, TextClassifier
    >>> from mohs.threat import Threat
    >>> from mohs.defenses.training.room import Room
    >>> net = TextClassifier(NormalisedEmbedding([0, 2, 1, 1], size=4), SentenceCNN(size=4))
    >>> room = Room(Threat.parse("l2:0.5 in [-inf, inf]"), eps=0.5, seed=0)
    >>> context = Context(perturb=lambda *_: None, eps=0.5, done=0.0, room=room)
    >>> loss = OnEmbeddings(VAT()).loss(net, torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([1]), context)
    >>> loss.backward()
    >>> bool(net.embedding.weight.grad.abs().sum() > 0)
    True

    **Differs from the paper**: dropout is off inside the classifier while r is found; that of the embedding is drawn once and is the
    same for r and for both looks.
    **Source**: T. Miyato, A. Dai, I. Goodfellow, "Adversarial training methods for semi-supervised text classification", ICLR 2017,
    the section on adversarial and virtual adversarial training.
    """

    objective: Objective
    whole: ClassVar[bool] = False  # embedding and classifier are called by themselves

    def __post_init__(self) -> None:
        check_inner("OnEmbeddings", self.objective)
        if prepares(self.objective):
            raise UsageError(
                f"OnEmbeddings cannot wrap {type(self.objective).__name__}, which replaces the inputs before the first step. "
                "Allowed: an objective that makes its points in each step, such as Mixture(attack) or VAT()."
            )

    @property
    def attack(self) -> Attack | None:
        """The objective's."""
        return self.objective.attack

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """The objective's loss at the embedded input."""
        embedding, classifier = (getattr(model, part, None) for part in ("embedding", "classifier"))
        if not isinstance(embedding, nn.Module) or not isinstance(classifier, nn.Module):
            raise ModelError(
                f"OnEmbeddings trains a net with the parts 'embedding' and 'classifier'; got {type(model).__name__}. Put the two into "
                "a mohs.models.TextClassifier."
            )
        e = embedding(x)

        def held(points: Tensor, of: Tensor) -> Tensor:
            """The very points, with the gradient of what they were made of."""
            return points.detach() + (of - of.detach())

        def once(make: Callable[[], Tensor]) -> Tensor:
            with torch.no_grad():  # slopes are asked for with gradients of their own
                points = context.once(make)
            return held(points, e)

        def perturb(
            attack: Attack | Last, x: Tensor, y: Tensor, *, of: nn.Module | None = None, radii: Tensor | None = None
        ) -> Tensor:
            net = classifier if of is None else of
            return held(context.perturb(attack, x.detach(), y, of=net, radii=radii), x)

        return self.objective.loss(classifier, e, y, replace(context, perturb=perturb, once=once))

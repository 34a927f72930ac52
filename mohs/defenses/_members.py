"""Several models as one: what the ensembles share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from mohs.defenses._base import Defended, Defense
from mohs.errors import ModelError, UsageError
from mohs.target import classify


class Ensemble(Defense, ABC):
    """A defense that asks several models; a subclass says how their logits become one answer."""

    def __call__(self, *models: nn.Module) -> nn.Module:
        """The models as one classifier; in training mode where any of them is."""
        if len(models) < 2:
            raise UsageError(
                f"{type(self).__name__} needs at least two models; got {len(models)}. Call it with them: "
                f"{type(self).__name__}()(model_a, model_b)."
            )
        members = nn.ModuleList(models)
        members.training = any(m.training for m in models)
        return Defended(self, members)

    def answer(self, model: nn.Module, x: Tensor, guiding: bool) -> Tensor:
        """Logits of the ensemble."""
        assert isinstance(model, nn.ModuleList)
        each = [classify(member, x) for member in model]
        classes = [z.shape[1] for z in each]
        if len(set(classes)) > 1:
            raise ModelError(f"The models of an ensemble must have the same classes; these have {classes}.")
        return self.combine(each, guiding)

    @abstractmethod
    def combine(self, each: Sequence[Tensor], guiding: bool) -> Tensor:
        """One answer from the logits [B, K] of each member."""

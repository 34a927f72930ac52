"""The logit by which a model rejects an input."""

from __future__ import annotations

from torch import nn

from mohs import defenses
from mohs.errors import UsageError


def rejection(model: nn.Module, logits: int, given: int | None) -> int | None:
    """The logit by which a model rejects an input: as given, or as its defenses declare; None: it rejects nothing."""
    said = logits - 1 if defenses.declared(model).rejects else None
    if given is None or not logits:
        return said
    at = given + logits if given < 0 else given
    if not 0 <= at < logits:
        raise UsageError(
            f"reject is the index of a logit; got {given} of a model with {logits}. Allowed: 0 to {logits - 1}, or -1."
        )
    if said not in (None, at):
        raise UsageError(
            f"The defenses of this model reject by logit {said}; reject={given} names another. Leave it out."
        )
    if at != logits - 1:
        raise UsageError(
            f"The rejection must be the last logit, {logits - 1}, so that labels keep their numbers; got {given}. Let the model "
            "move it there."
        )
    return at

"""What the commands say and ask of a model behind a URL."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mohs.errors import AccessError, ModelError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from mohs.evaluation import Plan
    from mohs.models.served import Answers
    from mohs.threat import Threat

_COUNT = re.compile("[0-9]{1,9}")


def refuse(model: str, access: str, answers: str | None) -> None:
    """Refuse an access that no server grants, before anything is loaded or asked."""
    from mohs.models import is_url

    if not is_url(model):
        return
    if access == "gradient":
        raise AccessError(
            "A served model gives no gradients, and --access gradient is the default. Say what its answers show: --access score "
            "for probabilities, logit for logits, label for the class alone."
        )
    if answers == "labels" and access != "label":
        raise AccessError(
            f"A server that answers labels shows no more than these; got --access {access}, allowed is label, with which "
            "mohs check works, and HopSkipJump of all attacks."
        )


def refuse_idle(model: str, plan: Plan, threat: Threat) -> None:
    """Refuse a run that would pay a server for checks and clean answers and then try nothing."""
    from mohs.models import is_url

    if is_url(model) and all(step.build_for(threat) is None for step in plan.steps):
        why = "; ".join(plan.skipped(threat)[:2]) or "all are meant for other regions"
        raise UsageError(
            f"No attack of the plan {plan.name!r} can be tried under {threat} with what the server shows ({why}). Without "
            "gradients there are HopSkipJump, in Linf and L2, and Square, from --access score on, in Linf, L2 and L1; mohs check "
            "needs no attack."
        )


def refuse_proof(model: str) -> None:
    """Refuse a certificate of a model whose layers nobody sees."""
    from mohs.models import is_url
    from mohs.models._transport import plain_url

    if is_url(model):
        raise AccessError(
            f"A certificate reads the layers of a model, and a server shows its answers alone; got {plain_url(model)!r}. Give "
            "the model itself: bundled:NAME, package.module:factory, FILE.pt2 or FILE.onnx."
        )


def connect(model: str, weights: Path | None, answers: str | None, classes: int | None, *, trusted: bool) -> nn.Module:
    """The model of a specification, served or not.

    Args:
        model: as ``mohs.models.load`` takes it.
        weights, answers, classes: the options of these names.
        trusted: was it typed in by the user? Otherwise a server named by a stranger's record would be sent their token.
    """
    from mohs import models
    from mohs.models._transport import AUTHORIZATION

    if not models.is_url(model):
        for name, value in (("answers", answers), ("classes", classes)):
            if value is not None:
                raise ModelError(f"--{name} says what a server answers; {model} is no URL. Leave it out.")
        return models.load(model, weights=weights)
    if weights is not None:
        return models.load(model, weights=weights)  # which says what is wrong
    token = os.environ.get(AUTHORIZATION)
    headers = {"Authorization": token} if token and trusted else None
    kind = cast("Answers", answers or "probabilities")  # Served says what is allowed
    return models.Served(model, answers=kind, classes=classes, headers=headers)


def spec(model: str, answers: str | None, classes: int | None) -> str:
    """How a record names a served model: the URL, and what it answers where that is not the usual."""
    named = f"{model} --answers {answers}" if answers not in (None, "probabilities") else model
    return named if classes is None else f"{named} --classes {classes}"


def parse(recorded: str) -> tuple[str, Answers | None, int | None]:
    """URL, answers and classes of what ``spec`` wrote; a URL holds no spaces.

    >>> parse(spec("http://h/v1/models/net:predict", "labels", 10))
    ('http://h/v1/models/net:predict', 'labels', 10)
    """
    url, *options = recorded.split()
    found = dict(zip(options[::2], options[1::2]))
    classes = found.get("--classes", "")
    said = cast("Answers | None", found.get("--answers"))  # looked at when it is used
    return url, said, int(classes) if _COUNT.fullmatch(classes) else None


def recorded(spec: str, answers: Answers | None, classes: int | None) -> tuple[str, Answers | None, int | None]:
    """URL, answers and classes of a recorded model, where the options of the command do not say otherwise."""
    url, said, known = parse(spec)
    said = answers or said
    return url, said, known if classes is None and said == "labels" else classes

"""What every attack and evaluation asks of its inputs, said in words that name the rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mohs.attacks._base import Attack
from mohs.attacks._outcome import Stop
from mohs.errors import DataError, ModelError, UsageError, rows_text
from mohs.regions import Patch, Words
from mohs.threat import Threat


def check_inputs(
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    targets: Tensor | None = None,
    eps: Tensor | None = None,
    restarts: int = 1,
    aims: int = 0,
    batch: int | None = None,
) -> None:
    """Raise on the first thing that is wrong with the arguments of an attack."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64) or x.dim() < 2:
        what = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise DataError(
            f"Inputs must be a float32 or float64 tensor [N, ...]; got {what}. Convert images to float in the threat's box; "
            "for a model of lower precision put the cast into the model: changes are measured in the inputs' own precision."
        )
    check_box(x, threat)
    if isinstance(threat.region, Patch | Words):
        threat.region.refuse(x)
    check_labels(y, len(x), "labels y")
    if targets is not None:
        check_labels(targets, len(x), "targets")
        same = (targets == y).nonzero().flatten().tolist()
        if same:
            raise DataError(f"Targets must differ from the labels; they are equal in {rows_text(same)}.")
        if aims:
            raise UsageError("aims and targets exclude each other: a target is the only class that counts.")
    if eps is not None:
        if not isinstance(eps, Tensor) or eps.shape != (len(x),):
            got = f"shape {tuple(eps.shape)}" if isinstance(eps, Tensor) else f"{eps!r}"
            raise DataError(f"eps must be a tensor of shape ({len(x)},), one radius per example; got {got}.")
        bad = (~(eps >= 0)).nonzero().flatten().tolist()
        if bad:
            raise DataError(f"Each eps must be >= 0; {rows_text(bad)} are negative or nan. Give radii in input units.")
    for name, value, least in (("restarts", restarts, 1), ("aims", aims, 0), ("batch", batch, 1)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise UsageError(f"{name} must be a whole number >= {least}; got {value!r}.")


def check_start(start: Tensor | None, x: Tensor, confidence: float) -> None:
    """Points to begin from have the inputs' shape and are finite; a confidence is a number >= 0."""
    if not isinstance(confidence, int | float) or not 0 <= confidence < math.inf:
        raise UsageError(f"confidence must be a number >= 0, in logits; got {confidence!r}.")
    if start is None:
        return
    if not isinstance(start, Tensor) or start.shape != x.shape:
        got = f"shape {tuple(start.shape)}" if isinstance(start, Tensor) else type(start).__name__
        raise DataError(f"start must be a tensor of the inputs' shape {tuple(x.shape)}; got {got}.")
    bad = (~start.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise DataError(f"start must be finite; found nan or inf in {rows_text(bad)}.")


def check_box(x: Tensor, threat: Threat) -> None:
    """Inputs must be finite and lie in the threat's box."""
    flat = x.flatten(1)
    if not len(x):
        return
    bad = (~flat.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise DataError(f"Inputs must be finite; found nan or inf in {rows_text(bad)}. Drop or repair these examples.")
    lo, hi = threat.box
    outside = ((flat.amin(1) < lo) | (flat.amax(1) > hi)).nonzero().flatten().tolist()
    if outside:
        raise DataError(
            f"Inputs must lie in the box [{lo:g}, {hi:g}] of the threat; {rows_text(outside)} range over "
            f"[{float(x.min()):.4g}, {float(x.max()):.4g}]. If they are normalised, put the normalisation into the model "
            "(mohs.models.normalized) and pass raw inputs; else state the box, such as 'linf:8 in [0, 255]'."
        )


def check_labels(y: Tensor, rows: int, what: str) -> None:
    """One int64 class per row, not negative."""
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != (rows,):
        got = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise DataError(f"The {what} must be int64 of shape ({rows},), one class per example; got {got}.")
    low = (y < 0).nonzero().flatten().tolist()
    if low:
        raise DataError(f"The {what} must be classes 0, 1, ...; {rows_text(low)} are negative.")


def check_mode(model: nn.Module) -> None:
    """A model in training mode answers for its batch mates, or at random, and may change while it is looked at."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"The model must be a torch.nn.Module; got {type(model).__name__}. Wrap a function in mohs.models.BlackBox."
        )
    frozen = [name for name, tensor in model.named_parameters() if tensor.is_inference()]
    if frozen:
        raise ModelError(
            f"The model was made or loaded inside torch.inference_mode ({frozen[0]} is an inference tensor), so no gradient "
            "can pass through it. Build it outside of that block."
        )
    for name, module in model.named_modules():
        if module.training and isinstance(module, nn.modules.batchnorm._NormBase | nn.modules.dropout._DropoutNd):
            raise ModelError(
                f"The model is in training mode ({name or 'model'}: {type(module).__name__}), so its answers depend on the batch or "
                "on chance. Call model.eval() first; Mohs does not flip modes behind your back."
            )


def share_of_queries(queries: int | None, rows: int, aims: int) -> int | None:
    """Looks of one row: the limit holds for an example, so its rows share it evenly (the look that ranks the aims comes off)."""
    if queries is None:
        return None
    share = (queries - bool(aims)) // rows
    if share < 1:
        raise UsageError(
            f"{rows} rows per example (restarts x aims) were asked for under a limit of {queries} queries per example. "
            "Each row needs at least one: use fewer restarts or aims, or raise Threat(queries=...)."
        )
    return share


def check_run(
    attack: object, seed: object, reject: int | None, stop: object, average: int | None, rank: object
) -> None:
    """What says how an attack is run must be of its kind."""
    if isinstance(attack, type) or not isinstance(attack, Attack):
        raise UsageError(
            f"attack must be an attack object such as mohs.attacks.PGD(steps=40); got {attack!r}. "
            f"Allowed: {', '.join(_known())}, made with parentheses."
        )
    if not isinstance(seed, int):
        raise UsageError(f"seed must be a whole number; got {seed!r}.")
    if reject is not None and (type(reject) is not int or reject < 0):
        raise UsageError(f"reject must be the index of a logit, counted from 0, or None; got {reject!r}.")
    if stop is not None and not isinstance(stop, Stop):
        raise UsageError(f"stop must be Stop.SUCCESS, Stop.BUDGET, Stop.LAST or None; got {stop!r}.")
    if average is not None and (type(average) is not int or average < 1):
        raise UsageError(f"average must be a whole number >= 1, or None; got {average!r}.")
    if not callable(rank):
        raise UsageError(f"rank must be mohs.attacks.by_logit, by_distance or a function like these; got {rank!r}.")


def _known() -> list[str]:
    from mohs.attacks import REGISTRY

    return list(REGISTRY)

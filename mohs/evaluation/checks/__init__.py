"""The doctor: looks at model, data and threat before any attack, and says what would make an evaluation worthless.

Each check is a small function ``Probe -> Seen`` in ``CHECKS``; adding one is one function and one line. A check never
changes the model: modes, buffers, gradients and random generators are as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mohs.attacks._inputs import check_labels
from mohs.data import Dataset
from mohs.errors import DataError, ModelError, UsageError, rows_text
from mohs.evaluation._given import pair
from mohs.evaluation._quiet import untouched
from mohs.evaluation.checks import (
    _ablation,
    _aimed,
    _answers,
    _behaviour,
    _climb,
    _consistency,
    _convergence,
    _gradient,
    _inputs,
    _inside,
    _landscape,
    _precision,
    _repeat,
    _seed,
    _slope,
    _validity,
)
from mohs.evaluation.checks._probe import Probe
from mohs.evaluation.checks._review import Review
from mohs.evaluation.checks._seen import Seen
from mohs.records.schema import Finding
from mohs.threat import Threat

CHECKS: dict[str, tuple[str, Callable[[Probe], Seen]]] = {
    "training-mode": ("training mode", _behaviour.training_mode),
    "input-box": ("inputs and box", _inputs.input_box),
    "distinct": ("distinct examples", _inputs.distinct),
    "radius": ("radius and box", _inputs.radius),
    "output-type": ("logits, not probabilities", _behaviour.output_type),
    "few-classes": ("number of classes", _behaviour.few_classes),
    "randomness": ("randomness", _behaviour.randomness),
    "frozen-seed": ("draws that are no secret", _seed.frozen_seed),
    "inner-search": ("no search inside the model", _inside.inner_search),
    "batch-coupling": ("independence of the batch", _behaviour.batch_coupling),
    "clean-accuracy": ("clean accuracy", _inputs.clean_accuracy),
    "precision": ("precision of the numbers", _precision.precision),
    "saturated-logits": ("saturated logits", _gradient.saturated_logits),
    "no-gradient": ("gradient exists", _gradient.no_gradient),
    "zero-gradient": ("gradient is not zero", _gradient.zero_gradient),
    "sparse-gradient": ("gradient reaches the input", _landscape.sparse_gradient),
    "imbalance": ("both logits are steep", _landscape.imbalance),
    "steadiness": ("noise leaves answers alone", _landscape.steadiness),
    "gradient-promise": ("gradient keeps its promise", _slope.kept_promise),
}
"""Every check by id: its name and its function, in the order of the findings."""

AFTERWARDS: dict[str, tuple[str, Callable[[Review], Seen]]] = {
    "optimisation": ("more steps change nothing", _convergence.optimisation),
    "restarts": ("more restarts change nothing", _convergence.restarts),
    "step-size": ("other step sizes change nothing", _climb.step_size),
    "means-success": ("the objective means success", _climb.means_success),
    "settled": ("attacks come to their end", _climb.settled),
    "one-step": ("iterations beat one step", _convergence.one_step),
    "unbounded": ("without a bound the attack succeeds", _convergence.unbounded),
    "masking": ("gradients beat search without them", _consistency.masking),
    "random-points": ("attacks beat chance", _consistency.random_points),
    "aims": ("with and without aims", _consistency.aims),
    "families": ("kinds of attacks", _consistency.families),
    "ablation": ("the model without its defense", _ablation.ablation),
    "transfer": ("transfer from the model without its defense", _ablation.transfer),
    "answers-only": ("gradients beat answers alone", _answers.answers_only),
    "stand-in": ("the model itself is attacked", _aimed.stand_in),
    "trained-against": ("other attacks than in training", _aimed.trained_against),
    "feasible": ("points inside region and box", _validity.feasible),
    "rescored": ("points fool the model again", _validity.rescored),
    "eight-bit": ("points as images of 8 bits", _validity.eight_bit),
    "repeatable": ("the attack repeats itself", _repeat.repeatable),
    "chance": ("chance decides answers", _repeat.chance),
    "resolution": ("examples enough", _repeat.resolution),
    "labels": ("labels agree", _validity.labels_agree),
    "whole-accuracy": ("clean accuracy of all examples", _validity.whole_accuracy),
}
"""Every check of an evaluation after its plan, by id, in the order of the findings. Each looks at the rows, or at little more."""
CURVE = "more radius breaks no less"
"""Name of the check of the accuracy curve, which is drawn last."""
CLIMBS = "the objective rises"
"""Name of the check of the loss curves."""


def check(
    model: nn.Module,
    data: Dataset | tuple[Tensor, Tensor],
    threat: Threat | str,
    *,
    stated_accuracy: float | None = None,
    seed: int = 0,
    batch: int | None = None,
) -> list[Finding]:
    """Examine a model, data and a threat for what would make a robustness number worthless.

    Looks at a random sample of 64 examples (256 for the clean accuracy). A model found in training mode is examined
    in eval mode, and given back in training mode.

    Args:
        model: inputs to logits [N, K], or one logit [N] or [N, 1].
        data: a ``Dataset`` or a pair (x floating point [N, ...], y int64 [N]); x may lie outside the box, which is a
            finding and no error here.
        threat: such as ``"linf:8/255"``.
        stated_accuracy: the clean accuracy the model is said to have, 0 to 1.
        seed: of the sample and the noise.
        batch: physical batch size; give it for a model that takes no other. None: up to 64 (256) at once.

    Returns:
        One ``Finding`` per check, in the order of ``CHECKS``: ``severity`` is 'ok', 'info', 'warn' (distrust an upheld
        claim) or 'block' (no verdict can be given); ``saw`` has the numbers, ``means`` and ``remedy`` the rest.

    Raises:
        ModelError: the model raises, or answers with something that is not logits.
        DataError: inputs or labels are not tensors that an attack could use.

    Cost: for n = min(N, 64), 9 passes of n, one more in double precision, up to 9 of one, 2 of four, 1 of min(N, 16), 1 of
    min(N, 256) - n, and 2 backwards of n and 2 of min(N, 16); 2 to 3 more passes where the model is in training mode or has no
    gradient, and a few of 4 or 16 to name a layer. A random model takes 7 passes of n, 36 of min(N, 16), 2 of two and 1 of one.
    With 256 examples that is at most 19 forwards for each of the 64. A ``batch`` larger than these is padded, and costs what it
    holds.

    >>> import mohs, torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Softmax(1)).eval()
    >>> x = torch.rand(32, 4, generator=torch.Generator().manual_seed(0))
    >>> found = mohs.check(net, (x, net(x).argmax(1)), "linf:0.1")
    >>> [f.id for f in found if f.severity == "warn"]
    ['output-type']
    """
    threat = Threat.parse(threat)
    x, y = pair(data)
    usable(model, x, y, stated_accuracy, batch)
    with untouched(model, seed):
        return examine(Probe(model, x, y, threat, stated_accuracy, seed, batch))


def examine(probe: Probe) -> list[Finding]:
    """What every check sees in a sample, in the order of ``CHECKS``."""
    findings = []
    for id_, (name, function) in CHECKS.items():
        seen = function(probe)
        findings.append(
            Finding(id=id_, name=name, severity=seen.severity, saw=seen.saw, means=seen.means, remedy=seen.remedy)
        )
    return findings


def usable(model: nn.Module, x: Any, y: Any, stated: float | None, batch: int | None) -> None:
    """Raise on what no check could look at."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"The model must be a torch.nn.Module; got {type(model).__name__}. Wrap a function in mohs.models.BlackBox."
        )
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or not x.numel():
        what = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise DataError(
            f"Inputs must be a floating-point tensor [N, ...] with N >= 1; got {what}. Convert images to float in the "
            "threat's box."
        )
    bad = (~x.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise DataError(f"Inputs must be finite; found nan or inf in {rows_text(bad)}. Drop or repair these examples.")
    check_labels(y, len(x), "labels y")
    if stated is not None and not 0 <= stated <= 1:
        raise UsageError(f"stated_accuracy must lie between 0 and 1; got {stated!r}. Write 93.5% as 0.935.")
    if batch is not None and (not isinstance(batch, int) or batch < 1):
        raise UsageError(f"batch must be a whole number >= 1; got {batch!r}.")


__all__ = ["AFTERWARDS", "CHECKS", "CLIMBS", "CURVE", "Finding", "Probe", "check", "examine", "usable"]

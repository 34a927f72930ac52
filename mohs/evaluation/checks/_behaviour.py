"""Checks of how the model behaves: its mode, its answers, chance, and its batch mates."""

from __future__ import annotations

import torch
from torch import nn

from mohs.evaluation.checks import _where
from mohs.evaluation.checks._probe import Probe, relative
from mohs.evaluation.checks._seen import Seen, ok
from mohs.threat import Access

WATCHED = 2
"""Sample rows whose way through a random model is followed layer by layer."""
ALONE = 8
"""Sample rows looked at with nothing else in the batch."""


def training_mode(probe: Probe) -> Seen:
    """Is some module in training mode, and does it matter? 2 passes if one is, else none; leaves eval mode behind."""
    training = probe.was_training
    if not training:
        return ok("every module is in eval mode")
    known = [
        f"{name or 'model'} ({type(m).__name__})"
        for name, m in training
        if isinstance(m, nn.modules.batchnorm._NormBase | nn.modules.dropout._DropoutNd)
    ]
    before = probe.forward(probe.x)
    probe.model.eval()
    change = relative(before, probe.logits)
    flips = int((before.argmax(1) != probe.logits.argmax(1)).sum())
    if not known and change <= 1e-6:
        return Seen(
            "info", f"{len(training)} modules are in training mode, but the answers are those of eval mode",
            "The mode makes no difference to this model.", "Call model.eval() all the same, to be safe.",
        )  # fmt: skip
    named = ", ".join(known[:3]) + (f" and {len(known) - 3} more" if len(known) > 3 else "")
    return Seen(
        "block",
        f"{len(training)} modules are in training mode{': ' + named if known else ''}; eval mode changes the logits "
        f"by up to {change:.2g} (relative) and {flips} of {len(probe.x)} answers",
        "Answers depend on the batch or on chance and are not those of the deployed model. All other checks were "
        "made in eval mode.",
        "Call model.eval() first.",
    )  # fmt: skip


def output_type(probe: Probe) -> Seen:
    """Does the model answer with probabilities? No pass of its own."""
    if probe.threat.access <= Access.LABEL:
        return ok("not looked at: the threat shows labels at most")
    z = probe.logits.double()
    # classify() writes a single logit z as the pair (0, z)
    single = z.shape[1] == 2 and bool((z[:, 0] == 0).all())
    inside = bool((z >= -1e-5).all() and (z <= 1 + 1e-5).all())
    if single and inside and len(probe.many_y.unique()) > 1:
        return Seen(
            "warn", f"one output per input, always between 0 and 1 ({z[:, 1].min():.4g} to {z[:, 1].max():.4g})",
            "This looks like a sigmoid. A single logit means class 1 when it is positive, so every input is called "
            "class 1, which the labels are not.",
            "Return the value before the sigmoid.",
        )  # fmt: skip
    total = z.sum(1)
    if not single and inside and bool(((total - 1).abs() < 1e-3).all()):
        certain = float((z.amax(1) >= 1).double().mean())
        return Seen(
            "warn",
            f"every row lies in [0, 1] and sums to one ({total.min():.6g} to {total.max():.6g}); {certain:.0%} of "
            "the rows hold an exact 1",
            "These are probabilities, not logits: a loss would take a second softmax of them, and where they round "
            "to 0 and 1 gradients vanish. Gradient attacks then look weaker than they are.",
            "Return what goes into the softmax, for example by leaving out the last layer.",
        )  # fmt: skip
    return ok(f"outputs from {z.min():.4g} to {z.max():.4g}, not normalised")


def few_classes(probe: Probe) -> Seen:
    """Are there classes enough for every objective? No pass of its own."""
    classes = probe.logits.shape[1]
    if classes >= 4:
        return ok(f"{classes} classes")
    return Seen(
        "info", f"{classes} classes",
        "Objectives that compare with the third or fourth highest logit (the difference-of-logits ratio needs 3, its "
        f"targeted form 4) are undefined, and there are only {classes - 1} classes to aim at.",
        "Use the cross-entropy or the margin, as the built-in plans do.",
    )  # fmt: skip


def randomness(probe: Probe) -> Seen:
    """Does the same input get the same answer? 5 passes: 3 repeats, and 2 on inputs with small noise; 2 more of 2
    rows find the layer that differs."""
    clean, noisy, flips = probe.spread
    if not probe.random:
        return ok(
            f"4 passes over {len(probe.x)} inputs and 2 over noisy ones agree (largest change {max(clean, noisy):.1g})"
        )
    where = "" if clean > 1e-5 else "; only inputs with noise show it"
    saw = (
        f"logits of the same input differ by up to {max(clean, noisy):.2g} (relative), and {flips} of {len(probe.x)} "
        f"answers flip{where}"
    )
    rows = (probe.x if clean > 1e-5 else probe.noisy)[:WATCHED]
    if origin := _where.differing(probe.model, rows):
        saw += f"; the first difference arises {origin}"
    if probe.threat.draws:
        return Seen(
            "info", saw,
            f"The model is random; each candidate is judged on {probe.threat.draws} fresh draws, as the threat says.",
            "Average gradients over draws; one gradient of a random model is mostly noise.",
        )  # fmt: skip
    return Seen(
        "block" if flips else "warn", saw,
        "The model is random, but the threat scores one draw: a lucky draw would count as a break, an unlucky one as "
        "robustness.",
        "Make the model deterministic, or state how it is scored: Threat(..., draws=20) judges on fresh draws.",
    )  # fmt: skip


def batch_coupling(probe: Probe) -> Seen:
    """Does an answer depend on the other inputs of the batch? 2 passes, and up to 8 of a single input."""
    x, z = probe.x, probe.logits
    if probe.random:
        return Seen(
            "info", "not tested: repeated passes already differ",
            "For a random model, dependence on the batch cannot be told from chance this way.",
            "Test it with the randomness switched off.",
        )  # fmt: skip
    rows = torch.arange(min(ALONE, len(x)), device=x.device)
    alone = relative(torch.stack([probe.alone(int(i)) for i in rows]), z[rows])
    order = torch.arange(len(x) - 1, -1, -1, device=x.device)
    permuted = relative(probe.forward(x[order])[order], z)
    # the first rows stay, their company becomes something it never was
    company = x.clone()
    company[len(rows) :] = company[len(rows) :].flip(tuple(range(1, x.dim()))) * 0.5
    mates = relative(probe.forward(company)[rows], z[rows])
    saw = (
        f"largest relative change of a logit: {alone:.1g} alone, {permuted:.1g} in another order, {mates:.1g} among "
        "other inputs"
    )
    if max(alone, permuted, mates) <= 1e-4:
        return ok(saw)
    return Seen(
        "block", saw,
        "An answer depends on which other inputs are in the batch, so 'the answer to an input' does not exist: an "
        "attack in a batch of attacked inputs meets another model than a user does.",
        "Look for batch statistics (BatchNorm in training mode or without running statistics) or a mean over the "
        "batch, and replace them by fixed numbers.",
    )  # fmt: skip

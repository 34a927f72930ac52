"""The nets that generative defenses are made of: by whom they were given, their digests, and the copy that is kept."""

from __future__ import annotations

import copy

import torch
from torch import nn

from mohs.defenses._base import Defense
from mohs.models.generative import bundled_digest, load_generative
from mohs.models.weights import weights_hash


def digest(net: nn.Module | None, bundled: str) -> str:
    """What a record names the net by; the bundled one by that of its file, also where it was loaded by hand."""
    if net is None:
        return bundled_digest(bundled)[:16]
    known, own = load_generative(bundled), weights_hash(net)
    same = type(known) is type(net) and weights_hash(known) == own
    return (bundled_digest(bundled) if same else own)[:16]


def kept(defense: Defense, net: nn.Module | None, bundled: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A copy of the net, or the bundled one, in eval mode and without gradients of its weights, kept from call to call."""
    found: nn.Module | None = defense.__dict__.get("_kept")
    if found is None:
        with torch.inference_mode(False):  # weights made there would be of no use to a descent
            found = load_generative(bundled) if net is None else copy.deepcopy(net)
            found = found.to(dtype).eval().requires_grad_(False)
        object.__setattr__(defense, "_kept", found)
    return found.to(device)

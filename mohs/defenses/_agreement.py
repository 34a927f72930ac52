"""How far two answers of a classifier are apart, and logits whose softmax has not saturated: what detectors compare."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SURE = 10.0
"""Logits between two classes up to which a softmax has a gradient worth following."""


def total_variation(z: Tensor, other: Tensor) -> Tensor:
    """L1 distance between the softmax of logits [B, K] and of others, [B]: 0 where they agree, 2 at most.

    >>> total_variation(torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]])).tolist()
    [2.0]
    """
    return (z.softmax(1) - other.softmax(1)).abs().sum(1)


def jensen_shannon(z: Tensor, other: Tensor) -> Tensor:
    """Jensen-Shannon divergence between the softmax of logits [B, K] and of others, [B] in nats: log 2 at most.

    >>> round(float(jensen_shannon(torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]]))), 4)
    0.6931
    """
    p, q = z.log_softmax(1), other.log_softmax(1)
    mean = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * (p.exp() * (p - mean) + q.exp() * (q - mean)).sum(1)


def unsaturated(z: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both logits [B, K], divided alike where their softmax is sure of two different classes.

    There either distance is at its maximum and without a gradient, though nothing is nearer to agreement than the other. With
    the lead of each answer over the other brought down to ``SURE``, the gradient says what to change.
    """
    one, two = (logits.detach().argmax(1, keepdim=True) for logits in (z, other))
    lead = torch.maximum(z.gather(1, one) - z.gather(1, two), other.gather(1, two) - other.gather(1, one)).detach()
    heat = (lead / SURE).clamp_min(1)
    return z / heat, other / heat

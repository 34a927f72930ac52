"""Gradients for models that hide them: module in, module out, so that no attack knows about it."""

from mohs.gradients.bpda import BPDA, Past, Through
from mohs.gradients.estimated import FiniteDifference, Smooth, reparameterize
from mohs.gradients.fitted import fit
from mohs.gradients.functions import BeforeSoftmax, Straight
from mohs.gradients.warp import Affine, Flow
from mohs.guide import Guide

__all__ = [
    "Affine",
    "BPDA",
    "BeforeSoftmax",
    "FiniteDifference",
    "Flow",
    "Guide",
    "Past",
    "Smooth",
    "Straight",
    "Through",
    "fit",
    "reparameterize",
]

"""Defenses: at inference time, one file per method; ``training`` holds those that are trained."""

from __future__ import annotations

from mohs.defenses._base import Declaration, Defended, Defense, Honest, declared
from mohs.defenses.bit_depth import BitDepth

REGISTRY: dict[str, type[Defense]] = {"bit-depth": BitDepth}
"""Every defense by the name the command line knows it by."""

__all__ = ["REGISTRY", "BitDepth", "Declaration", "Defended", "Defense", "Honest", "declared"]

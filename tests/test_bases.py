"""Bases that leave something to their subclasses cannot be built without it, and say what is missing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mohs.certificates._layers import Affine
from mohs.defenses._detector import Detector
from mohs.defenses._members import Ensemble
from mohs.gradients.estimated import _Around
from mohs.gradients.warp import Warp


class HalfDetector(Detector):
    pass


class HalfEnsemble(Ensemble):
    pass


class HalfWarp(Warp):
    pass


class HalfGuide(_Around):
    pass


class HalfLayer(Affine):
    def linear(self, v: torch.Tensor) -> torch.Tensor:
        return v


@pytest.mark.parametrize(
    ("half", "given", "missing"),
    [
        (HalfDetector, (), "score"),
        (HalfEnsemble, (), "combine"),
        (HalfWarp, (torch.zeros(1, 1, 2, 2), 1), "grid"),
        (HalfGuide, (nn.Linear(2, 2), 0.1, 1), "_estimate"),
        (HalfLayer, ((2,), (2,), 1, 1, 1.0), "adjoint"),
    ],
)
def test_a_subclass_that_lacks_a_part_cannot_be_built(half: type, given: tuple[object, ...], missing: str) -> None:
    with pytest.raises(TypeError, match=f"abstract.*{missing}"):
        half(*given)

"""Certificates on nets of the verification competition of 2021, whose answers several verifiers agree on."""

from __future__ import annotations

import csv
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mohs
from mohs.certificates import CROWN, IBP, certify
from mohs.regions import Linf
from mohs.threat import Threat


def read_property(path: Path) -> tuple[Tensor, int, float]:
    """Centre, label and radius of a property that says: the label wins everywhere in this Linf ball within [0, 1]."""
    text = path.read_text()
    stated = re.match(r"; Mnist property with label: (\d+)", text)
    assert stated is not None
    label = int(stated.group(1))
    eps = float(path.stem.rsplit("_", 1)[1])
    ends = {}
    for sign in ("<=", ">="):
        found = re.findall(rf"assert \({sign} X_(\d+) ([-+.e\d]+)\)", text)
        ends[sign] = np.array([float(v) for _, v in sorted(found, key=lambda pair: int(pair[0]))])
    low, high = ends[">="], ends["<="]
    center = np.where(low <= 0, high - eps, np.where(high >= 1, low + eps, (low + high) / 2))
    return torch.tensor(center.clip(0, 1), dtype=torch.float32), label, eps


def layers_of(net: nn.Module) -> nn.Sequential:
    """The converted chain as the nn.Sequential that a certificate reads."""
    children = (nn.Flatten() if type(m).__name__ == "Flatten" else m for m in net.net.children())
    return nn.Sequential(*children).eval()


# of these 30 auto_LiRPA 0.7.1 proves 10 with CROWN and none with IBP
@pytest.mark.parametrize(("depth", "eps", "at_least"), [(2, 0.03, 7), (2, 0.05, 4)])
def test_the_fully_connected_nets(shared: Path, depth: int, eps: float, at_least: int) -> None:
    if importlib.util.find_spec("onnx2pytorch") is None:
        pytest.skip("needs the extra onnx")
    folder = shared / "vnncomp2021"
    name = f"mnistfc/mnist-net_256x{depth}.onnx"
    net = layers_of(mohs.models.load(str(folder / name)))
    with (folder / "labels.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r["onnx"] == name and r["vnnlib"].endswith(f"_{eps}.vnnlib")]
    assert len(rows) >= 14
    x, y, sizes = zip(*(read_property(folder / r["vnnlib"]) for r in rows))
    assert set(sizes) == {eps}
    images, labels = torch.stack(x).view(-1, 1, 28, 28), torch.tensor(y)
    proof = certify(CROWN(), net, images, labels, Threat(Linf(eps)))
    refuted = torch.tensor([r["label"] == "sat" for r in rows])
    assert not (proof.holds & refuted).any()
    assert proof.holds.sum() >= at_least
    weak = certify(IBP(), net, images, labels, Threat(Linf(eps)))
    assert (weak.margin_bound <= proof.margin_bound).all()

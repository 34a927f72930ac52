"""The benchmark's adapters: each peer does what is asked, and an absent peer is a reason, not a failure."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import peers, shim

CASES = [(kind, library) for kind, libraries in peers.PEERS.items() for library in libraries]
EPS, STEPS, STEP_SIZE = 0.1, 5, 0.03

# What a call spends beyond its steps: a final test of success, a look at the number of classes.
EXTRA_FORWARDS = {"foolbox": 1, "torchattacks": 0, "art": 3, "adv-lib": 0}


class Counted(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = 0
        self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        logits = self.model(x)
        if logits.requires_grad and x.requires_grad:
            logits.register_hook(self._pulled)
        return logits

    def _pulled(self, gradient: Tensor) -> None:
        self.backwards += 1


@pytest.fixture
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(7)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) / 2
    x = 0.2 + 0.6 * torch.rand(12, 1, 4, 4, generator=draw)
    with torch.no_grad():
        return model, x, model(x).argmax(1)


def test_unknown_peer_is_a_reason() -> None:
    reason = peers.missing("cleverhans")
    assert reason is not None
    assert "cleverhans" in reason
    assert "torchattacks" in reason


def test_peer_that_breaks_on_import_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(library: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist\nand a long trace")

    monkeypatch.setattr(peers, "load", broken)
    peers.missing.cache_clear()
    try:
        assert peers.missing("foolbox") == (
            "foolbox cannot be imported: RuntimeError: operator torchvision::nms does not exist"
        )
    finally:
        peers.missing.cache_clear()


def test_seeding_a_peer_leaves_global_randomness_alone() -> None:
    before_torch, before_numpy = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    with peers.seeded(5):
        first = (torch.rand(3), np.random.rand(3))  # noqa: NPY002
    with peers.seeded(5):
        second = (torch.rand(3), np.random.rand(3))  # noqa: NPY002
    assert torch.equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])
    assert torch.equal(before_torch, torch.random.get_rng_state())
    assert np.array_equal(before_numpy, np.random.get_state()[1])  # noqa: NPY002


def test_stub_leaves_an_imported_module_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    present = object()
    monkeypatch.setitem(sys.modules, "visdom", present)
    shim.stub_visdom()
    assert sys.modules["visdom"] is present


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("kind", "library"), CASES)
def test_peer_does_what_is_asked(kind: str, library: str, problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    reason = peers.missing(library)
    if reason is not None:
        pytest.skip(reason)
    model, x, y = problem
    counted = Counted(model).eval()
    attack = peers.PEERS[kind][library]
    adversarial = attack(counted, x.clone(), y.clone(), EPS, STEPS, STEP_SIZE, 3)

    assert adversarial.shape == x.shape
    assert adversarial.dtype == torch.float32
    assert not adversarial.requires_grad
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert torch.equal(adversarial, attack(model, x.clone(), y.clone(), EPS, STEPS, STEP_SIZE, 3))
    change = (adversarial - x).flatten(1)
    if kind.startswith("deepfool"):
        with torch.no_grad():
            assert (model(adversarial).argmax(1) != y).float().mean() > 0.5
        return
    size = change.norm(dim=1) if kind.endswith("l2") else change.abs().amax(1)
    assert size.max() <= EPS + 1e-6
    steps = 1 if kind == "fgsm" else STEPS
    extra = 1 if (kind, library) == ("fgsm", "art") else EXTRA_FORWARDS[library]
    assert counted.backwards == steps
    assert counted.forwards == steps + extra


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("library", ["foolbox", "torchattacks", "art"])
def test_steps_have_the_size_asked(library: str, problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    """From the input itself, two short steps in a wide ball move no pixel further than two step sizes."""
    reason = peers.missing(library)
    if reason is not None:
        pytest.skip(reason)
    model, x, y = problem
    change = (peers.PEERS["bim"][library](model, x, y, 0.2, 2, 0.01, 0) - x).abs()
    assert change.max() == pytest.approx(0.02, abs=1e-6)

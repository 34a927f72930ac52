"""Certificates as calls: batches, radii, one logit, side effects, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from certificate_nets import answers, conv_net, margin, random_net
from torch import Tensor, nn

from mohs.certificates import CROWN, IBP, certify
from mohs.certificates._net import read_net
from mohs.errors import DataError, ModelError, ThreatError, UsageError
from mohs.regions import Linf
from mohs.threat import Threat

BOTH = (IBP(), CROWN())


# ---- properties


def test_a_batch_equals_its_singletons() -> None:
    net = conv_net()
    x = torch.rand(5, 2, 9, 8, generator=torch.Generator().manual_seed(1))
    y = answers(net, x)
    for certificate in (IBP(), CROWN(), CROWN(memory=1)):
        whole = certify(certificate, net, x, y, "linf:0.02")
        for i in range(5):
            alone = certify(certificate, net, x[i : i + 1], y[i : i + 1], "linf:0.02", batch=1)
            torch.testing.assert_close(
                whole.take(torch.tensor([i])).margin_bound, alone.margin_bound, rtol=1e-9, atol=1e-9
            )
        split = certify(certificate, net, x, y, "linf:0.02", batch=2)
        assert torch.equal(whole.holds, split.holds)


def test_a_larger_radius_never_proves_more() -> None:
    net = random_net(4, 10, 10, 3, seed=1)
    x = torch.rand(10, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = answers(net, x)
    for certificate in BOTH:
        last = torch.full((10,), math.inf, dtype=torch.float64)
        for eps in (0.0, 0.01, 0.05, 0.2, math.inf):
            bound = certify(certificate, net, x, y, Threat(Linf(eps))).margin_bound
            if isinstance(certificate, IBP):
                assert (bound <= last + 1e-9).all()
            last = bound
        assert last.isfinite().all()  # an infinite radius is the whole box


def test_no_radius_is_the_clean_margin() -> None:
    net = random_net(4, 10, 10, 3, seed=1)
    x = torch.rand(10, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = answers(net, x)
    for certificate in BOTH:
        proof = certify(certificate, net, x, y, "linf:0")
        torch.testing.assert_close(proof.margin_bound, margin(net, x, y), rtol=1e-6, atol=1e-6)
        assert (proof.margin_bound <= margin(net, x, y)).all()


def test_wrong_and_undecided_rows_do_not_hold() -> None:
    net = random_net(4, 6, 3)
    x = torch.rand(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = (answers(net, x) + 1) % 3
    proof = certify(CROWN(), net, x, y, "linf:0.0001")
    assert not proof.holds.any()
    assert torch.equal(proof.radius, torch.zeros(8))
    constant = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, dtype=torch.float64))
    nn.init.zeros_(constant[1].weight), nn.init.zeros_(constant[1].bias)
    assert not certify(CROWN(), constant, x, torch.zeros(8, dtype=torch.int64), "linf:0").holds.any()  # a tie


@pytest.mark.parametrize("flat", [False, True])
def test_one_logit(flat: bool) -> None:
    net = random_net(4, 6, 1, seed=4)
    if flat:
        net.append(nn.Flatten(0))
    x = torch.rand(12, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = answers(net, x)
    assert 0 < y.sum() < 12
    pair = nn.Sequential(*list(net)[:3], nn.Linear(1, 2, dtype=torch.float64))
    pair[-1].weight.data, pair[-1].bias.data = torch.tensor([[0.0], [1.0]]).double(), torch.zeros(2).double()
    for certificate in BOTH:
        one, two = (certify(certificate, m, x, y, "linf:0.02") for m in (net, pair))
        assert torch.equal(one.holds, two.holds)
        torch.testing.assert_close(one.margin_bound, two.margin_bound, rtol=1e-9, atol=1e-9)
    assert one.holds.any()


def test_nothing_of_the_model_changes_and_no_rows_are_fine() -> None:
    net = conv_net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    flags = [p.requires_grad for p in net.parameters()]
    proof = certify(CROWN(), net, torch.rand(0, 2, 9, 8), torch.zeros(0, dtype=torch.int64), "linf:0.1")
    assert proof.holds.shape == proof.radius.shape == proof.margin_bound.shape == (0,)
    x = torch.rand(2, 2, 9, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    certify(CROWN(), net, x, answers(net, x), "linf:0.01")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(p.grad is None for p in net.parameters())


def test_the_adjoint_of_every_layer() -> None:
    # <a, W v> = <a W, v>, on the layers with windows at the edge, groups, dilation and ceilings
    x = torch.rand(1, 2, 9, 8, dtype=torch.float64)
    net = nn.Sequential(
        *list(conv_net().double())[:6], nn.AvgPool2d(3, 2, ceil_mode=True), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )
    read = read_net(net, x, torch.float64)
    generator = torch.Generator().manual_seed(3)
    checked = 0
    for layer in read.layers:
        if hasattr(layer, "adjoint"):
            v = torch.randn(1, *layer.in_shape, generator=generator, dtype=torch.float64)
            a = torch.randn(1, *layer.out_shape, generator=generator, dtype=torch.float64)
            left, right = (a * layer.linear(v)).sum(), (layer.adjoint(a) * v).sum()
            torch.testing.assert_close(left, right)
            outputs = torch.arange(a.numel())
            matrix = layer.adjoint(torch.eye(a.numel(), dtype=torch.float64).view(-1, *layer.out_shape))
            torch.testing.assert_close(layer.rows(outputs, a), matrix)
            checked += 1
    assert checked == 6


# ---- refusals


class Doubled(nn.Linear):
    """Computes something else than its type says."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class FakeNormalisation(nn.Module):
    """Has a mean and a std and uses them otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.std = torch.zeros(4).double(), torch.full((4,), 2.0).double()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.std


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Tanh(), "Tanh.*Supported: Linear"),
        (nn.MaxPool2d(2), "MaxPool2d"),
        (Doubled(4, 4, dtype=torch.float64), "Doubled"),
        (nn.Dropout(0.5), "model.eval"),
        (nn.BatchNorm1d(4, track_running_stats=False, dtype=torch.float64).eval(), "eval"),
        (nn.Linear(5, 4, dtype=torch.float64), "does not fit"),
        (FakeNormalisation(), "answers differently"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_unreadable_nets_are_refused(layer: nn.Module, words: str) -> None:
    net = nn.Sequential(layer, nn.Linear(4, 2, dtype=torch.float64))
    with pytest.raises(ModelError, match=words):
        certify(IBP(), net, torch.full((3, 4), 0.3, dtype=torch.float64), torch.zeros(3, dtype=torch.int64), "linf:0.1")


def test_hooks_are_refused() -> None:
    net = random_net(4, 3, 2)
    net[0].register_forward_hook(lambda module, args, out: -out)
    with pytest.raises(ModelError, match=r"layer '0' \(Linear\) has a forward hook"):
        certify(IBP(), net, torch.rand(1, 4).double(), torch.zeros(1, dtype=torch.int64), "linf:0.1")


def test_bad_calls_are_refused() -> None:
    net, x, y = random_net(4, 3, 2), torch.rand(5, 4).double(), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ThreatError, match="l0:2"):
        certify(CROWN(), net, x, y, "l0:2")
    with pytest.raises(DataError, match="row 3"):
        certify(CROWN(), net, torch.where(torch.arange(5).unsqueeze(1) == 3, math.nan, x), y, "linf:0.1")
    with pytest.raises(DataError, match="rows 0, 1, 2, 3 and 4"):
        certify(CROWN(), net, x + 2, y, "linf:0.1")
    with pytest.raises(DataError, match="2 classes, 0 to 1; other labels came in rows 1 and 4"):
        certify(CROWN(), net, x, torch.tensor([0, 2, 0, 0, -1]), "linf:0.1", batch=4)
    with pytest.raises(DataError, match="one integer label per input"):
        certify(CROWN(), net, x, y[:3], "linf:0.1")
    with pytest.raises(UsageError, match="batch=0"):
        certify(CROWN(), net, x, y, "linf:0.1", batch=0)
    with pytest.raises(UsageError, match=r"dtype=torch\.float16"):
        certify(IBP(dtype=torch.float16), net, x, y, "linf:0.1")
    with pytest.raises(UsageError, match="memory=0"):
        CROWN(memory=0)

"""Mean relative change and the radius that breaks most: closed forms on linear models, and the edges."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mohs import objectives
from mohs.attacks import FGSM, PGD, DeepFool
from mohs.errors import AccessError, DataError, ModelError, ThreatError, UsageError
from mohs.evaluation.robustness import Radius, relative_sizes, rho_adv, smallest_radius

D = 12
FREE = (-math.inf, math.inf)


def inputs(n: int = 40, seed: int = 0) -> Tensor:
    return torch.rand(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def affine(classes: int, seed: int = 0) -> nn.Linear:
    """Logits w x + b with the boundary among the inputs."""
    g = torch.Generator().manual_seed(seed)
    net = nn.Linear(D, classes).double()
    net.weight.data = torch.randn(classes, D, generator=g, dtype=torch.float64)
    net.bias.data = -net.weight.data.sum(1) / 2
    return net.eval()


def exact_distance(net: nn.Linear, x: Tensor, p: float) -> Tensor:
    """Of every input to the nearest decision boundary in the p-norm, no box."""
    q = 1.0 if math.isinf(p) else math.inf if p == 1 else p / (p - 1)
    w, z = net.weight.data, net(x).detach()
    if len(w) == 1:
        return z[:, 0].abs() / torch.linalg.vector_norm(w, q)
    own = z.argmax(1)
    gap = z.gather(1, own[:, None]) - z
    dual = torch.linalg.vector_norm(w[own][:, None] - w[None], q, dim=2)
    distance = gap / dual
    return distance.scatter(1, own[:, None], math.inf).amin(1)


class Counted(nn.Module):
    """Counts rows passed."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.rows = net, 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return self.net(x)


class TestRhoAdv:
    @pytest.mark.parametrize("norm", ["l2", "linf", "l1", "l1.5"])
    @pytest.mark.parametrize("classes", [1, 2, 5])
    def test_closed_form(self, norm: str, classes: int) -> None:
        p = math.inf if norm == "linf" else float(norm[1:])
        net, x = affine(classes), inputs()
        exact = exact_distance(net, x, p) / torch.linalg.vector_norm(x, p, dim=1)
        assert rho_adv(DeepFool(overshoot=1e-7), net, x, norm=norm) == pytest.approx(float(exact.mean()), rel=1e-3)

    def test_overshoot_is_part_of_the_change(self) -> None:
        net, x = affine(3), inputs()
        exact = exact_distance(net, x, 2) / x.norm(dim=1)
        assert torch.allclose(relative_sizes(DeepFool(overshoot=0.1), net, x), 1.1 * exact, rtol=1e-3)

    def test_the_same_norm_above_and_below(self) -> None:
        x = inputs()
        scale = torch.linspace(0.5, 2, 40, dtype=torch.float64)[:, None]
        net = affine(1)
        net.bias.data.zero_()  # then |w x| / ||x|| does not depend on the length of x
        for norm in ("l2", "linf", "l1"):
            assert torch.allclose(
                relative_sizes(DeepFool(overshoot=1e-7), net, x, norm=norm),
                relative_sizes(DeepFool(overshoot=1e-7), net, scale * x, norm=norm),
                rtol=1e-4,
            )

    def test_no_box(self) -> None:
        net, x = affine(1), inputs(8)
        x[:, 0] = 100.0  # far outside [0, 1]
        exact = exact_distance(net, x, 2) / x.norm(dim=1)
        assert rho_adv(DeepFool(overshoot=1e-7), net, x) == pytest.approx(float(exact.mean()), rel=1e-3)

    def test_images(self) -> None:
        net = nn.Sequential(nn.Flatten(), affine(3)).eval()
        x = inputs()
        assert rho_adv(DeepFool(), net, x.view(-1, 1, 3, 4)) == pytest.approx(rho_adv(DeepFool(), net, x))

    def test_does_not_depend_on_the_batch(self) -> None:
        net, x = affine(4), inputs(21)
        whole = relative_sizes(DeepFool(), net, x)
        assert torch.allclose(relative_sizes(DeepFool(), net, x, batch=4), whole, rtol=1e-9)

    def test_a_failure_is_infinite_and_named(self) -> None:
        class Flat(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                steep = x[:, :1] - 0.5
                return torch.where(x[:, 1:2] > 0.9, steep.detach() * 0 + 1 + 0 * x[:, :1], steep)

        x = torch.full((5, D), 0.6, dtype=torch.float64)
        x[[1, 3], 1] = 0.95
        with pytest.warns(RuntimeWarning, match=r"2 of 5 inputs \(rows 1 and 3\).*relative_sizes"):
            assert rho_adv(DeepFool(), Flat().eval(), x, norm="linf") == math.inf
        sizes = relative_sizes(DeepFool(), Flat().eval(), x, norm="linf")
        assert sizes.isinf().tolist() == [False, True, False, True, False]

    def test_refusals(self) -> None:
        net, x = affine(2), inputs(6)
        blank = x.clone()
        blank[[2, 4]] = 0
        with pytest.raises(DataError, match="zeros in rows 2 and 4"):
            rho_adv(DeepFool(), net, blank)
        with pytest.raises(DataError, match="at least one input"):
            rho_adv(DeepFool(), net, x[:0])
        with pytest.raises(ThreatError, match="finite radius"):
            rho_adv(PGD(), net, x)
        with pytest.raises(UsageError, match="l0"):
            rho_adv(DeepFool(), net, x, norm="l0")
        with pytest.raises(ModelError, match="training mode"):
            rho_adv(DeepFool(), nn.Sequential(nn.Dropout(), net).train(), x)
        with pytest.raises(DataError, match="float32 or float64"):
            rho_adv(DeepFool(), net, torch.ones(3, D, dtype=torch.int64))


class TestSmallestRadius:
    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
    @pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l3"])
    def test_closed_form(self, share: float, norm: str) -> None:
        """Two classes and no box: FGSM is exact, so the radius is an order statistic of the distances."""
        p = math.inf if norm == "linf" else float(norm[1:])
        net, x = affine(1), inputs(40)
        distance = exact_distance(net, x, p).sort().values
        expected = float(distance[round(share * 40) - 1])
        eps, broken = smallest_radius(net, x, share=share, norm=norm, box=FREE, tolerance=1e-4)
        assert eps == pytest.approx(expected, rel=2e-4)
        assert broken == pytest.approx(float((distance < eps).double().mean()))
        assert broken >= share

    def test_at_the_answer_the_share_is_reached_and_just_below_not(self) -> None:
        net, x = affine(1), inputs(40)
        for tolerance in (0.3, 0.01):
            eps, broken = smallest_radius(net, x, box=FREE, tolerance=tolerance)
            distance = exact_distance(net, x, math.inf)
            assert broken == float((distance < eps).double().mean())
            assert float((distance < eps * (1 - tolerance)).double().mean()) < 0.9

    def test_the_box_limits_the_step(self) -> None:
        net = nn.Linear(2, 1).double().eval()
        net.weight.data = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
        net.bias.data = torch.tensor([-0.5], dtype=torch.float64)
        x = torch.tensor([[0.65, 0.05]], dtype=torch.float64)
        assert smallest_radius(net, x, box=FREE, tolerance=1e-4).eps == pytest.approx(0.1, rel=1e-3)
        # in the box the second coordinate can give 0.05 only, so the first must give 0.15
        assert smallest_radius(net, x, tolerance=1e-4).eps == pytest.approx(0.15, rel=1e-3)

    def test_unreachable_share(self) -> None:
        net = affine(1)
        net.bias.data.fill_(1e3)  # no point of the box is on the other side
        assert smallest_radius(net, inputs()) == Radius(math.inf, 0.0)

    def test_partly_reachable_share(self) -> None:
        class Masked(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.where(x[:, 1:2] > 0.5, 0 * x[:, :1] + 1, x[:, :1] - 0.4)

        x = torch.full((10, 2), 0.5, dtype=torch.float64)
        x[:4, 1] = 0.9
        eps, most = smallest_radius(Masked().eval(), x, share=0.9)
        assert (eps, most) == (math.inf, pytest.approx(0.6))
        assert smallest_radius(Masked().eval(), x, share=0.6).eps == pytest.approx(0.1, rel=0.02)

    def test_an_unbounded_flat_model_ends(self) -> None:
        flat = nn.Linear(D, 1).double().eval()
        flat.weight.data.zero_()
        flat.bias.data.fill_(1.0)
        assert smallest_radius(flat, inputs(), box=FREE) == Radius(math.inf, 0.0)

    def test_a_radius_far_below_the_start_of_the_scan(self) -> None:
        net = affine(1)
        x = inputs(1)
        w = net.weight.data
        net.bias.data = -(x @ w.T)[0] + 1e-7 * w.abs().sum()
        assert smallest_radius(net, x, box=FREE, tolerance=1e-3).eps == pytest.approx(1e-7, rel=1e-2)

    def test_not_monotone(self) -> None:
        """Broken in a band of radii and right again beyond: the answer is a radius that does break."""

        class Band(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                d = x[:, :1] - 0.5  # the gradient at 0.9 points down, the answer flips below 0.5 and again below 0.45
                return torch.where(d > -0.05, d, d + 1.0).where(d > -0.35, d)

        x = torch.full((1, 2), 0.9, dtype=torch.float64)
        eps, broken = smallest_radius(Band().eval(), x, box=FREE, share=1.0)
        assert broken == 1.0
        point = x.clone()
        point[0, 0] -= eps
        assert float(Band()(point)) < 0
        assert 0.4 < eps < 0.45 or 0.75 < eps < 0.77

    def test_labels(self) -> None:
        net, x = affine(1), inputs(40)
        own = (net(x)[:, 0] > 0).long()
        assert smallest_radius(net, x, y=own) == smallest_radius(net, x)
        y = own.clone()
        y[:38] = 1 - y[:38]
        assert smallest_radius(net, x, y=y) == Radius(0.0, 0.95)

    @pytest.mark.parametrize("objective", [objectives.cross_entropy, objectives.margin])
    def test_objective_of_the_method(self, objective: objectives.Objective) -> None:
        """Several classes: the direction is the objective's, and along it every gap is linear in the radius."""
        net, x = affine(4), inputs(40)
        w, z = net.weight.data, net(x).detach()
        own = z.argmax(1)
        rest = z.scatter(1, own[:, None], -math.inf)
        if objective is objectives.margin:
            gradient = w[rest.argmax(1)] - w[own]
        else:
            gradient = rest.softmax(1) @ w - w[own]
        gain = (gradient.sign()[:, None] * (w[None] - w[own][:, None])).sum(2)
        reach = (z.gather(1, own[:, None]) - z) / gain
        reach[(gain <= 0) | (torch.arange(4) == own[:, None])] = math.inf
        expected = float(reach.amin(1).sort().values[35])
        found = smallest_radius(net, x, box=FREE, tolerance=1e-4, method=FGSM(objective=objective))
        assert found.eps == pytest.approx(expected, rel=2e-4)

    def test_images_and_batches(self) -> None:
        net = nn.Sequential(nn.Flatten(), affine(3)).eval()
        x = inputs(21)
        whole = smallest_radius(net, x)
        assert smallest_radius(net, x.view(-1, 1, 3, 4)) == whole
        assert smallest_radius(net, x, batch=4).eps == pytest.approx(whole.eps)

    def test_one_gradient_per_input_then_forwards_only(self) -> None:
        net, pulls = Counted(affine(1)), []
        net.net.weight.register_hook(lambda g: pulls.append("weight"))
        x = inputs(40)
        smallest_radius(net, x)
        assert net.rows % 40 == 0
        assert net.rows / 40 <= 25
        assert not pulls  # the gradient is of the input only

    def test_leaves_no_trace(self) -> None:
        net, x = affine(2), inputs()
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
        smallest_radius(nn.Sequential(nn.Dropout(), net).eval(), x)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
        assert random.getstate() == before[2]
        assert net.weight.grad is None
        assert torch.equal(x, inputs())

    def test_refusals(self) -> None:
        net, x = affine(2), inputs(6)
        for share in (0.0, 1.1, math.nan):
            with pytest.raises(UsageError, match="share"):
                smallest_radius(net, x, share=share)
        with pytest.raises(UsageError, match="tolerance"):
            smallest_radius(net, x, tolerance=0.0)
        with pytest.raises(UsageError, match="FGSM"):
            smallest_radius(net, x, method=PGD())  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="l0"):
            smallest_radius(net, x, norm="l0")
        with pytest.raises(ThreatError):
            smallest_radius(net, x, norm="what")
        with pytest.raises(DataError, match="box"):
            smallest_radius(net, x + 1)
        with pytest.raises(DataError, match="at least one input"):
            smallest_radius(net, x[:0])
        with pytest.raises(DataError, match="labels y"):
            smallest_radius(net, x, y=torch.zeros(3).long())
        with pytest.raises((ModelError, AccessError)):
            smallest_radius(Detached(), x)


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()[:, :3]

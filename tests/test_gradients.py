"""Guides: answers of the model bit for bit, and gradients that lead somewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_models import Hidden, Layer, Wrapped, coarse, dead
from torch import Tensor, nn

import mohs
from mohs.attacks import PGD
from mohs.errors import AccessError, ModelError, UsageError
from mohs.gradients import BPDA, BeforeSoftmax, FiniteDifference, Past, Smooth, Straight, Through, reparameterize
from mohs.gradients.bpda import identity
from mohs.guide import answers_for
from mohs.threat import Access, Threat


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)).eval()


def images(n: int = 5) -> Tensor:
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
    return g


GUIDES = {
    "through": lambda m: Through(m, {"0": None}),
    "past": lambda m: Past(m, "1"),
    "straight": Straight,
    "smooth": lambda m: Smooth(m, 0.1, 3),
    "differences": lambda m: FiniteDifference(m, 0.1, 3),
    "smooth through": lambda m: Smooth(Through(m, {"0": None}), 0.1, 3),
}


@pytest.mark.parametrize("name", GUIDES)
def test_answers_are_the_models_bit_for_bit(name: str) -> None:
    model, x = nn.Sequential(Layer(coarse), net()).eval(), images()
    guide = GUIDES[name](model)
    for asked in (x, x.clone().requires_grad_(True)):
        assert torch.equal(guide(asked).detach(), model(x).detach())
    assert answers_for(guide, model)
    assert not answers_for(guide, net())


@pytest.mark.parametrize("name", ["through", "past", "straight"])
def test_the_identity_going_back_is_the_gradient_at_the_rounded_point(name: str) -> None:
    inner = net()
    model, x = nn.Sequential(Layer(coarse), inner).eval(), images()
    assert bool((gradient(model, x) == 0).all())
    # (7 x) / 7 has slope 1, whichever of its parts is passed over
    assert torch.allclose(gradient(GUIDES[name](model), x), gradient(inner, Layer(coarse)(x)), rtol=1e-5, atol=1e-8)


def test_a_guide_leaves_nothing_behind() -> None:
    model, x = nn.Sequential(Layer(coarse), net()).eval(), images()
    for make in GUIDES.values():
        gradient(make(model), x)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_the_hooks_are_gone_after_an_error() -> None:
    def fails(inner: nn.Module, x: Tensor) -> Tensor:
        inner(x)
        raise ValueError

    model = Wrapped(fails, net()).eval()
    for guide in (Through(model, {"net.2": None}), Past(model, "net")):
        with pytest.raises(ValueError):
            guide(images())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "function",
    [
        lambda inner, x: inner((x * 7).round() / 7),
        lambda inner, x: inner(torch.floor(x * 7) / 7),
        lambda inner, x: inner(x.detach()),
        lambda inner, x: inner(x + (x.sign() - x).detach()),
    ],
)
def test_functions_are_passed_straight_through_even_in_a_model_that_shows_nothing(
    function: Callable[..., Tensor],
) -> None:
    model, x = Hidden(Wrapped(function, net())).eval(), images()
    x.requires_grad_(True)
    (g,) = torch.autograd.grad(Straight(model)(x)[:, 0].sum(), x)
    assert bool((g != 0).any())


class Search(nn.Module):
    """Answers at what a search by gradients of its own ends with, from the input or from a point of its own."""

    def __init__(self, own: bool, steps: int = 4) -> None:
        super().__init__()
        self.net, self.own, self.steps = net(), own, steps
        self.decoder = nn.Sequential(nn.Linear(3, 16), nn.Unflatten(1, (1, 4, 4)))  # its weights have gradients too

    def found(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = torch.zeros(len(x), 3) if self.own else x.detach().clone()
            for _ in range(self.steps):
                z = z.detach().requires_grad_()
                error = (self.decoder(z) - x.detach() if self.own else self.net(z).sin()).square().sum()
                z = z - 0.1 * torch.autograd.grad(error, z)[0]
        with torch.no_grad():
            return self.decoder(z.detach()) if self.own else z.detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.found(x))


class Optimised(nn.Module):
    """The same with an optimiser of torch."""

    def __init__(self, own: bool, optimiser: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net, self.own, self.optimiser = net(), own, optimiser
        self.decoder = nn.Sequential(nn.Linear(3, 16), nn.Unflatten(1, (1, 4, 4)))

    def found(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = (torch.zeros(len(x), 3) if self.own else x.detach().clone()).requires_grad_()
            solver = self.optimiser([z])
            for _ in range(3):
                solver.zero_grad()
                error = (self.decoder(z) - x.detach() if self.own else self.net(z).sin()).square().sum()
                error.backward(inputs=[z])
                solver.step()
        with torch.no_grad():
            return self.decoder(z.detach()) if self.own else z.detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.found(x))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_search_with_an_optimiser_is_left_alone_too(own: bool, kind: type[torch.optim.Optimizer]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Optimised(own, lambda z: kind(z, lr=0.05)).eval()
    x = images()
    expected = gradient(model.net, model.found(x))
    for compare in (False, True):
        guide = Straight(Hidden(model), attach=True, compare=compare)
        assert torch.equal(guide(x.clone().requires_grad_(True)), model(x))
        assert torch.allclose(gradient(guide, x), expected, rtol=1e-4, atol=1e-7)
    assert torch.equal(Straight(Hidden(model))(x.clone().requires_grad_(True)), model(x))


@pytest.mark.parametrize("own", [True, False])
def test_a_search_inside_is_left_alone_and_what_it_finds_goes_on(own: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Search(own).eval()
    x = images()
    for compare in (False, True):
        guide = Straight(Hidden(model), attach=True, compare=compare)
        asked = x.clone().requires_grad_(True)
        assert torch.equal(guide(asked), model(x))
        assert torch.allclose(gradient(guide, x), gradient(model.net, model.found(x)), rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())


def test_what_comes_back_from_numpy_is_attached() -> None:
    def codec(inner: nn.Module, x: Tensor) -> Tensor:
        return inner(torch.from_numpy((x.detach().numpy() * 7).round() / 7))

    model, x = Hidden(Wrapped(codec, net())).eval(), images()
    assert torch.equal(Straight(model, attach=True)(x), model(x))
    expected = gradient(net(), Layer(coarse)(x))
    assert torch.allclose(gradient(Straight(model, attach=True), x), expected, rtol=1e-5, atol=1e-8)


def test_what_is_filled_in_place_is_filled() -> None:
    def filled(inner: nn.Module, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, :, ::2] = x[:, :, ::2]
        out.add_(0.1).clamp_(0, 1)
        return inner(out)

    model, x = Hidden(Wrapped(filled, net())).eval(), images()
    assert torch.equal(Straight(model, attach=True)(x.clone().requires_grad_(True)), model(x))


def test_a_block_without_gradients_gets_them() -> None:
    def closed(inner: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            return inner(x)

    model, x = Hidden(Wrapped(closed, net())).eval(), images()
    assert torch.allclose(gradient(Straight(model), x), gradient(net(), x))
    assert torch.is_grad_enabled()


def test_differences_and_smoothing_agree_with_the_gradient_of_a_linear_model() -> None:
    linear, x = nn.Linear(6, 2, bias=False).double(), torch.rand(2, 6, dtype=torch.float64)
    assert torch.allclose(gradient(Smooth(linear, 0.3, 2), x), linear.weight[0].expand(2, 6))
    # the mean of u u^T w over n draws has a standard error of |w| / sqrt(n) in each coordinate
    found = gradient(FiniteDifference(linear, 0.3, 3000), x)
    error = 5 * float(linear.weight[0].detach().norm()) / 3000**0.5
    assert bool(((found - linear.weight[0]).abs() < error).all())


def test_estimates_belong_to_the_point_not_to_the_batch() -> None:
    model, x = nn.Sequential(Layer(coarse), net()).eval(), images()
    for make in (GUIDES["smooth through"], GUIDES["differences"]):
        whole = gradient(make(model), x)
        alone = torch.cat([gradient(make(model), row) for row in x.split(1)])
        assert torch.allclose(whole, alone, rtol=1e-4, atol=1e-7)
        assert not torch.equal(gradient(make(model), x), gradient(make(model), x + 1e-3))


def test_differences_need_logits_only() -> None:
    model, x = nn.Sequential(Layer(coarse), net()).eval(), images(16)
    y, threat = model(x).argmax(1), Threat(mohs.Linf(0.3), access=Access.LOGIT)
    out = mohs.attack(PGD(steps=10), model, x, y, threat, guide=FiniteDifference(model, 0.2, 8))
    assert int(out.success.sum()) > int(mohs.attack(PGD(steps=10), model, x, y, "linf:0.3").success.sum())
    assert int(out.backwards.max()) == int(out.forwards.max() - 1) * 16  # two looks a draw; the last look pulls nothing
    with pytest.raises(AccessError, match="LOGIT"):
        mohs.attack(PGD(steps=10), model, x, y, threat, guide=Through(model, {"0": None}))


def test_before_the_softmax_saturated_probabilities_have_gradients() -> None:
    inner = net()
    model = Wrapped(lambda m, x: (1000 * m(x)).softmax(1), inner).eval()
    x = images(32)
    y = model(x).argmax(1)
    assert torch.allclose(BeforeSoftmax(model)(x), 1000 * inner(x))
    plain = mohs.attack(PGD(steps=20), model, x, y, "linf:0.3", stop=None).success.sum()
    found = mohs.attack(PGD(steps=20), model, x, y, "linf:0.3", guide=BeforeSoftmax(model))
    assert int(found.success.sum()) > int(plain)
    assert bool((model(found.x[found.success]).argmax(1) != y[found.success]).all())


def test_the_gate_of_an_inner_layer_is_not_taken_for_the_answer() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.last = nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            return self.last(x * self.gate(x).sigmoid()).softmax(1)

    model, x = Gated().eval(), images()
    assert torch.allclose(BeforeSoftmax(model)(x).softmax(1), model(x))


def test_before_no_softmax_there_is_nothing() -> None:
    with pytest.raises(ModelError, match="calls no softmax"):
        BeforeSoftmax(net())(images())


def test_a_stand_in_gives_the_gradient_of_its_own() -> None:
    layer = BPDA(torch.round, backward=lambda x: x**2)
    x = torch.tensor([[0.4, 3.0]], requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.tolist() == [[0.0, 3.0]]
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.tensor([[0.8, 6.0]]))


def test_a_stand_in_of_another_shape_is_refused() -> None:
    layer = BPDA(lambda x: x.repeat(1, 2, 1, 1)[:, :, :1], backward=lambda x: x)
    with pytest.raises(ModelError, match="stand-in answers"):
        layer(images().requires_grad_(True))
    with pytest.raises(ModelError, match="identity cannot stand in"):
        identity(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, 4))


def test_unknown_layers_are_refused() -> None:
    for make in (lambda m: Through(m, {"layer9": None}), lambda m: Past(m, "layer9")):
        with pytest.raises(UsageError, match=r"no layer 'layer9'.*It has"):
            make(net())


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_bad_noise_is_refused(sigma: float) -> None:
    with pytest.raises(UsageError, match="sigma"):
        Smooth(net(), sigma)
    with pytest.raises(UsageError, match="draws"):
        FiniteDifference(net(), 0.1, 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 6]))
def test_the_identity_keeps_the_sum_of_gradients_of_a_code(channels: int, times: int, size: int, wide: int) -> None:
    x = torch.rand(2, channels, size, size, requires_grad=True)
    stand_in = identity(x, torch.zeros(2, channels * times, wide, wide))
    assert stand_in.shape == (2, channels * times, wide, wide)
    (g,) = torch.autograd.grad(stand_in.sum(), x)
    assert torch.allclose(g.sum(), torch.tensor(2.0 * channels * times * wide * wide), rtol=1e-4)


def test_the_latent_of_a_model_is_attacked_as_an_input() -> None:
    latent = reparameterize(net(), lambda z: torch.tanh(z).view(-1, 1, 4, 4))
    z = torch.zeros(4, 16)
    out = mohs.attack(PGD(steps=20), latent, z, latent(z).argmax(1), Threat(mohs.Linf(2.0), box=(-3, 3)))
    assert bool(out.success.any())


class Noisy(nn.Module):
    """Adds noise to the logits."""

    def __init__(self, model: nn.Module, sigma: float) -> None:
        super().__init__()
        self.model, self.sigma, self.calls = model, sigma, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = torch.randn(len(x), *[1] * (x.dim() - 1)) * self.sigma
        return self.model(x * (1 + noise))


def test_evaluations_of_a_random_model_are_averaged_and_counted() -> None:
    model, x = Noisy(net(), 0.3).eval(), images(8)
    y = net()(x).argmax(1)
    threat = Threat(mohs.Linf(0.05), draws=5)
    out = mohs.attack(PGD(steps=4), model, x, y, threat, average=6, stop=mohs.attacks.Stop.BUDGET)
    assert out.backwards.tolist() == [4 * 6] * 8
    judged = out.forwards - 5 * 6  # four looks with gradients and the last one
    assert bool((judged % 5 == 0).all())
    once = mohs.attack(PGD(steps=4), model, x, y, threat, average=1, stop=mohs.attacks.Stop.BUDGET)
    assert once.backwards.tolist() == [4] * 8


def test_the_averaged_gradient_is_that_of_the_mean_objective() -> None:
    from mohs.objectives import cross_entropy, margin
    from mohs.problem import Findings, Goal, Problem
    from mohs.target import Target

    class Alternating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets, self.turn = [net(1), net(2)], 0

        def forward(self, x: Tensor) -> Tensor:
            self.turn += 1
            return self.nets[self.turn % 2](x)

    x = images(3)
    y = net(1)(x).argmax(1)
    target = Target(Alternating().eval(), average=2, draws=1)
    zero = torch.zeros(3, dtype=torch.int64)
    problem = Problem(
        target,
        Threat.parse("linf:0.1"),
        x,
        torch.full((3,), 0.1),
        Goal.leave(y),
        zero,
        zero,
        zero,
        zero,
        Findings.none(x),
    )
    for objective in (margin, cross_entropy):
        wanted = torch.zeros_like(x)
        value = torch.zeros(3)
        for seed in (1, 2):
            leaf = x.clone().requires_grad_(True)
            logits = net(seed)(leaf)
            one, cotangent = objective(logits.detach(), problem.goal)
            wanted += torch.autograd.grad(logits, leaf, cotangent)[0] / 2
            value += one / 2
        view = problem.linearize(x, objective)
        assert torch.allclose(view.value, value)
        assert torch.allclose(view.gradient(), wanted, rtol=1e-5, atol=1e-8)


def test_the_backward_pass_of_a_custom_function_is_replaced_if_asked() -> None:
    model, x = Hidden(Wrapped(lambda inner, x: inner(dead(x)), net())).eval(), images()
    assert bool((gradient(Straight(model), x) == 0).all())
    assert torch.allclose(gradient(Straight(model, custom=True), x), gradient(net(), x))
    assert bool((gradient(model, x) == 0).all())  # nothing is left behind
    ours = Straight(BPDA(torch.round, backward=lambda x: 3 * x), custom=True)  # a declared stand-in stays
    assert gradient(ours, torch.tensor([[0.2, 0.7]])).tolist() == [[3.0, 0.0]]

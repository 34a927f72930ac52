"""Warps as latents: pixels where geometry says, gradients against differences, and attacks that find an angle."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from core_models import inputs
from torch import Tensor, nn

import mohs
from mohs.attacks import APGD, PGD
from mohs.errors import ModelError, UsageError
from mohs.gradients import Affine, Flow, reparameterize
from mohs.models.weights import weights_hash


def latent(warp: Affine | Flow, **values: float) -> Tensor:
    """The clean latents with some parameters moved."""
    z = warp.clean
    for place, value in values.items():
        z[:, 1 + ["turn", "right", "down", "size"].index(place)] = value
    return z


WARPS = [
    lambda x: Affine(x, 30, 0.1, 0.2),
    lambda x: Flow(x, 1.5),
    lambda x: Flow(x, 1.5, points=3),
]


@pytest.mark.parametrize("make", WARPS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 9)], ids=str)
def test_no_warp_is_the_identity(make: object, shape: tuple[int, int, int]) -> None:
    x = inputs(5, *shape)
    warp = make(x)
    torch.testing.assert_close(warp(warp.clean), x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("make", WARPS)
def test_rows_know_their_own_image(make: object) -> None:
    x = inputs(7, 1, 6, 6)
    warp = make(x)
    z = warp.clean + (torch.rand(7, warp.clean.shape[1], generator=torch.Generator().manual_seed(3)) * 2 - 1)
    order = torch.tensor([6, 2, 2, 0])
    assert torch.equal(warp(z)[order], warp(z[order]))
    moved = z.clone()
    moved[:, 0] = warp.clean[:, 0] + 1.9  # nothing that a radius of 1 allows changes which image it is
    assert torch.equal(warp(moved), warp(z))


def test_a_quarter_turn_and_whole_shifts_are_exact() -> None:
    x = inputs(3, 2, 8, 8, dtype=torch.float64)
    warp = Affine(x, degrees=90, shift=0.25)
    torch.testing.assert_close(warp(latent(warp, turn=1.0)), x.rot90(1, (2, 3)), rtol=0, atol=1e-9)
    torch.testing.assert_close(warp(latent(warp, turn=-1.0)), x.rot90(-1, (2, 3)), rtol=0, atol=1e-9)
    right = torch.zeros_like(x)
    right[..., 2:] = x[..., :-2]
    torch.testing.assert_close(warp(latent(warp, right=1.0)), right, rtol=0, atol=1e-9)
    down = torch.zeros_like(x)
    down[:, :, 1:] = x[:, :, :-1]
    torch.testing.assert_close(warp(latent(warp, down=0.5)), down, rtol=0, atol=1e-9)


def test_turns_are_turns_where_sides_differ() -> None:
    # a disc stays where and what it is
    i, j = torch.meshgrid(torch.arange(9) - 4.0, torch.arange(15) - 7.0, indexing="ij")
    disc = torch.exp(-(i**2 + j**2) / 6).double().view(1, 1, 9, 15)
    warp = Affine(disc, degrees=90)
    assert float((warp(latent(warp, turn=0.37)) - disc).abs().max()) < 0.06
    bar = torch.zeros(1, 1, 9, 15, dtype=torch.float64)
    bar[..., 4, 4:11] = 1.0
    turned = Affine(bar, degrees=90)(latent(warp, turn=1.0))
    assert turned.argmax(3).flatten()[1:8].tolist() == [7] * 7
    torch.testing.assert_close(turned.sum(), bar.sum(), rtol=1e-6, atol=1e-6)


def test_sizes_grow_and_shrink() -> None:
    x = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    x[..., 6:10, 6:10] = 1.0
    warp = Affine(x, degrees=0, shift=0, scale=1.0)
    assert float(warp(latent(warp, size=1.0)).sum()) == pytest.approx(64, rel=0.05)
    assert float(warp(latent(warp, size=-1.0)).sum()) == pytest.approx(4, rel=0.05)


def test_flow_reads_from_where_it_says() -> None:
    x = inputs(2, 1, 6, 7, dtype=torch.float64)
    warp = Flow(x, pixels=2.0)
    z = warp.clean
    flow = z[:, 1:].view(2, 2, 6, 7)
    flow[:, 0, 2, 3], flow[:, 1, 2, 3] = 0.5, -1.0  # one down, two to the left
    flow[:, 1, 4, 4] = 0.25  # half a pixel to the right
    z[:, 1:] = flow.flatten(1)
    out = warp(z)
    torch.testing.assert_close(out[..., 2, 3], x[..., 3, 1])
    torch.testing.assert_close(out[..., 4, 4], (x[..., 4, 4] + x[..., 4, 5]) / 2)
    out[..., 2, 3], out[..., 4, 4] = x[..., 2, 3], x[..., 4, 4]
    torch.testing.assert_close(out, x)
    smooth = Flow(x, pixels=1.0, points=2)
    z = smooth.clean
    z[:, 1 + 4 :] = 1.0  # everything from one pixel to the right
    torch.testing.assert_close(smooth(z)[..., :-1], x[..., 1:])


@pytest.mark.parametrize("make", WARPS)
def test_gradients_agree_with_finite_differences(make: object) -> None:
    x = inputs(2, 2, 5, 6, dtype=torch.float64)
    warp = make(x)
    z = warp.clean
    z[:, 1:] += 0.6 * torch.rand(z[:, 1:].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.31
    weight = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def value(point: Tensor) -> Tensor:
        return (warp(point) * weight).flatten(1).sum(1)

    point = z.clone().requires_grad_()
    (g,) = torch.autograd.grad(value(point).sum(), point)
    assert not g[:, 0].any()
    step = 1e-6
    for k in range(1, z.shape[1]):
        moved = torch.zeros_like(z)
        moved[:, k] = step
        slope = (value(z + moved) - value(z - moved)) / (2 * step)
        torch.testing.assert_close(g[:, k], slope, rtol=1e-5, atol=1e-6)


class Upright(nn.Module):
    """Says 0 to a bar that stands and 1 to one that leans by more than about half a pixel at its ends."""

    def forward(self, x: Tensor) -> Tensor:
        middle = x.shape[3] // 2
        stands = x[:, 0, 2:-2, middle].sum(1)
        return torch.stack([stands, 0.7 * torch.full_like(stands, float(x.shape[2] - 4))], 1)


def test_an_attack_finds_a_rotation_that_errs_and_none_where_none_does() -> None:
    x = torch.zeros(4, 1, 15, 15)
    x[:, :, 1:-1, 7] = 1.0
    y = torch.zeros(4, dtype=torch.int64)
    for degrees, errs in ((20.0, True), (1.0, False)):
        warp = Affine(x, degrees=degrees, shift=0.0)
        model = reparameterize(Upright(), warp).eval()
        out = mohs.attack(APGD(steps=20), model, warp.clean, y, warp.threat, restarts=2)
        assert out.success.tolist() == [errs] * 4
        images = warp(out.x)
        assert torch.equal(Upright()(images).argmax(1) != y, out.success)
        angles = out.x[:, 1] * degrees
        assert bool((angles.abs() <= degrees * 1.0001).all())
        if errs:
            assert float(angles.abs().min()) > 2


@pytest.mark.parametrize("make", [lambda x: Affine(x), lambda x: Flow(x, 1.0, points=7)])
def test_a_real_net_errs_and_the_answer_does_not_depend_on_order(make: object) -> None:
    data, net = mohs.data.load("bundled:fashion-mnist", n=24), mohs.models.load("bundled:fashion-natural")
    warp = make(data.x)
    model = reparameterize(net, warp).eval()
    run = {"threat": warp.threat, "restarts": 3, "batch": 8}
    out = mohs.attack(PGD(steps=10), model, warp.clean, data.y, **run)
    assert float(out.success.double().mean()) > 0.5
    assert torch.equal(net(warp(out.x)).argmax(1) != data.y, out.success)
    order = torch.arange(24).flip(0)
    again = mohs.attack(PGD(steps=10), model, warp.clean[order], data.y[order], **run)
    assert torch.equal(again.x, out.x[order])


def test_other_images_or_another_decoder_are_another_model() -> None:
    x, net = inputs(3, 1, 6, 6), nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    one, same, other = (reparameterize(net, Affine(v)) for v in (x, x.clone(), x.flip(0)))
    assert weights_hash(one) == weights_hash(same) != weights_hash(other)
    assert repr(one) == repr(same)
    named = [repr(reparameterize(net, f)) for f in (torch.tanh, torch.sigmoid, latent, functools.partial(latent))]
    assert "decode=test_warp.latent" in named[2]
    assert len(set(named)) == 4
    assert not any("0x" in name for name in named)


def test_what_is_wrong_is_said() -> None:
    x = inputs(3, 1, 6, 6)
    for low in (torch.float16, torch.bfloat16):
        with pytest.raises(UsageError, match=rf"float32 or float64; got {low}"):
            Affine(x.to(low))
        with pytest.raises(ModelError, match=rf"float32 or float64; got {low}"):
            Affine(x)(Affine(x).clean.to(low))
    with pytest.raises(UsageError, match=r"images \[N, C, H, W\]; got \(3, 36\)"):
        Affine(x.flatten(1))
    with pytest.raises(UsageError, match="degrees must be a finite number >= 0; got -1"):
        Affine(x, degrees=-1)
    with pytest.raises(UsageError, match="points must be a whole number >= 2"):
        Flow(x, points=1)
    with pytest.raises(UsageError, match="pixels"):
        Flow(x, pixels=math.inf)
    warp = Affine(x)
    with pytest.raises(ModelError, match=r"rows of 5 numbers; got shape \(3, 4\)"):
        warp(warp.clean[:, :4])
    with pytest.raises(ModelError, match="names image 3 or 5; there are 3"):
        warp(warp.clean + torch.tensor([12.0, 0, 0, 0, 0]))

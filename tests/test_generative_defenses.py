"""PixelCNN and generator, and the defenses made of them, against what can be worked out by hand."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from defended_nets import fashion, net
from torch import Tensor, nn

import mohs
from mohs import defenses
from mohs.attacks import PGD
from mohs.defenses import Defense, DefenseGAN, PixelDefend, declared, parse
from mohs.defenses.defense_gan import project
from mohs.errors import ModelError, UsageError
from mohs.models.generative import load_generative, save_generative
from mohs.models.generator import Generator
from mohs.models.pixelcnn import LEVELS, PixelCNN, bits_per_dim, log_mass, scan

SIZE = 9


@functools.cache
def density(size: int = SIZE) -> PixelCNN:
    """A small one in double precision, with weights that no training has seen; tests must leave it as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PixelCNN(width=5, mixtures=3, size=size).double().eval().requires_grad_(False)


def noise(rows: int, size: int = SIZE, seed: int = 0) -> Tensor:
    return torch.rand(rows, 1, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestPixelCNN:
    @pytest.mark.parametrize("place", [(0, 0), (0, 5), (4, 0), (4, 4), (5, 8), (8, 8)])
    def test_a_pixel_sees_all_that_comes_before_it_and_nothing_else(self, place: tuple[int, int]) -> None:
        x = noise(1).requires_grad_()
        (g,) = torch.autograd.grad(density()(x)[0, :, place[0], place[1]].sum(), x)
        seen = (g[0, 0] != 0).flatten()
        at = place[0] * SIZE + place[1]
        assert not bool(seen[at:].any())
        if place == (4, 4):  # in the middle nothing is out of reach: no blind spot
            assert bool(seen[:at].all())

    def test_conditionals_sum_to_one(self) -> None:
        described = density()(noise(2)) * 30  # logits and scales of all sizes, the flattest and the steepest
        total = density().conditionals(described).exp().sum(-1)
        assert torch.allclose(total, torch.ones_like(total), atol=1e-9)

    @pytest.mark.parametrize("centre", [-1.02, 0.2, 1.02])
    def test_the_mass_of_one_logistic(self, centre: float) -> None:
        scale = 0.05
        described = torch.tensor([0.0, centre, math.log(scale)], dtype=torch.float64)
        levels = torch.tensor([0.0, 140.0, 160.0, 255.0], dtype=torch.float64)

        def below(level: float) -> float:
            return 1 / (1 + math.exp(-((2 * level - LEVELS + 1) / (LEVELS - 1) - centre) / scale))

        expected = [below(0.5), below(140.5) - below(139.5), below(160.5) - below(159.5), 1 - below(254.5)]
        assert log_mass(described, levels).exp().tolist() == pytest.approx(expected, rel=1e-9)

    def test_far_tails_keep_their_order(self) -> None:
        described = torch.tensor([0.0, 0.9, -6.0], dtype=torch.float64)  # of a mass that no float could hold there
        found = log_mass(described, torch.arange(1.0, 100.0, dtype=torch.float64))
        assert bool(found.isfinite().all())
        assert bool((found.diff() > 0).all())

    def test_the_likelihood_is_the_product_of_the_conditionals(self) -> None:
        x = (noise(2) * 255).round() / 255
        table = density().conditionals(density()(x))
        levels = (x[:, 0] * 255).round().long().unsqueeze(-1)
        expected = table.gather(-1, levels).sum((1, 2, 3))
        assert torch.allclose(density().log_likelihood(x), expected)
        assert float(bits_per_dim(torch.tensor(-80 * math.log(256.0)), 80)) == pytest.approx(8.0)

    @pytest.mark.parametrize("rows", [0, 1, 3])
    def test_the_scan_sees_what_the_full_forward_sees(self, rows: int) -> None:
        x, new, seen = noise(rows), iter(noise(rows, seed=1).flatten(1).t()), []

        def choose(described: Tensor, pixel: Tensor) -> Tensor:
            seen.append(described)
            return next(new)

        out = scan(density(), x, choose)
        assert torch.equal(out, noise(rows, seed=1))
        assert torch.equal(x, noise(rows))
        found = torch.stack(seen, -1).view(rows, 9, SIZE, SIZE)
        assert torch.allclose(found, density()(out), atol=1e-12)

    def test_other_shapes_are_refused(self) -> None:
        with pytest.raises(ModelError, match=r"\[B, 1, 9, 9\]; got inputs of shape \(1, 3, 9, 9\)"):
            density()(torch.zeros(1, 3, 9, 9))


class TestPixelDefend:
    def test_pixels_stay_near_and_are_the_likeliest_there(self) -> None:
        defense, x = PixelDefend(20 / 255, density()), noise(3).float()
        out = defense.transform(x)
        levels = out.double() * 255
        assert float((out - x).abs().max()) <= 20 / 255 + 1e-5
        assert torch.allclose(levels, levels.round(), atol=1e-4)
        table = density().conditionals(density()(levels.round() / 255))
        chosen = table.gather(-1, levels[:, 0].round().long().unsqueeze(-1)).squeeze(-1)
        near = (torch.arange(256) / 255 - x[:, 0].double().unsqueeze(-1)).abs() <= 20 / 255 - 1e-6
        best = table.masked_fill(~near, -math.inf).amax(-1)
        assert bool((chosen >= best - 1e-9).all())
        assert bool((chosen > best - 1e-9).all())
        assert float((out - x).abs().max()) > 10 / 255  # it did something

    def test_a_known_conditional(self) -> None:
        flat = copy.deepcopy(density())
        for p in flat.parameters():
            p.zero_()
        last = flat.head[-1]
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        last.bias[3:6], last.bias[6:] = 2 * 100 / 255 - 1, -3.0  # every pixel: one logistic around level 100
        x = torch.tensor([0.0, 90.0, 100.0, 110.0, 130.0, 255.0]).repeat(14)[: SIZE * SIZE].view(1, 1, SIZE, SIZE) / 255
        moved = (PixelDefend(16 / 255, flat).transform(x) * 255).round()
        wanted = {0: 16, 90: 100, 100: 100, 110: 100, 130: 114, 255: 239}
        assert moved.flatten().tolist() == [wanted[round(v)] for v in (x * 255).flatten().tolist()]

    def test_declared_and_named(self) -> None:
        small, other = PixelDefend(net=density()), PixelDefend(net=density(8))
        assert small != PixelDefend()
        assert small == PixelDefend(net=copy.deepcopy(density()))
        assert repr(small) != repr(PixelDefend(net=PixelCNN(4, 2, SIZE)))
        assert (small.random, small.unit, small.smooth) == (False, True, False)
        assert other.transform(noise(1, 8)).shape == (1, 1, 8, 8)

    def test_settings_that_cannot_be(self) -> None:
        with pytest.raises(UsageError, match="eps must be a number at least"):
            PixelDefend(0.0)
        with pytest.raises(UsageError, match=r"net must be a mohs\.models\.pixelcnn\.PixelCNN or None; got Linear"):
            PixelDefend(net=nn.Linear(1, 1))  # type: ignore[arg-type]
        with pytest.raises(ModelError, match=r"needs inputs in \[0, 1\]"):
            PixelDefend(net=density()).transform(noise(1) * 255)

    def test_the_bundled_density_undoes_noise(self) -> None:
        defense, x = parse("pixel-defend"), fashion()[0][:4]
        shaken = (x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
        assert isinstance(defense, PixelDefend)
        out = defense.transform(shaken)
        known = defense._density(x.device)
        assert bool((known.log_likelihood(out.double()) > known.log_likelihood(shaken.double()) + 500).all())
        with pytest.raises(ModelError, match="28, 28"):
            defense.transform(torch.zeros(1, 3, 32, 32))


class Affine(nn.Module):
    """A generator whose nearest image is known: orthonormal columns."""

    def __init__(self, latent: int = 4) -> None:
        super().__init__()
        self.latent = latent
        columns = torch.linalg.qr(torch.randn(25, latent, generator=torch.Generator().manual_seed(1)))[0]
        self.columns = nn.Parameter(0.2 * columns)

    def forward(self, z: Tensor) -> Tensor:
        return (z @ self.columns.t() + 0.5).view(-1, 1, 5, 5)


class TestDefenseGAN:
    def test_what_the_generator_made_comes_back(self) -> None:
        z = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
        x = Affine()(z).detach()
        found = project(Affine(), x, torch.zeros(3, 1, 4), steps=300, rate=100.0)
        assert torch.allclose(found, z, atol=1e-3)

    def test_anything_else_becomes_the_nearest_it_can_make(self) -> None:
        x = noise(5, 5).float()
        basis = Affine().columns.detach() / 0.2
        nearest = ((x.flatten(1) - 0.5) @ basis @ basis.t() + 0.5).view_as(x)
        out = DefenseGAN(steps=300, starts=1, rate=100.0, generator=Affine()).transform(x)
        assert torch.allclose(out, nearest, atol=1e-3)

    def test_the_best_start_is_taken(self) -> None:
        class Two(nn.Module):  # two valleys: from below zero only 0.2 is reached, from above 0.9
            latent = 1

            def forward(self, z: Tensor) -> Tensor:
                return torch.where(z < 0, 0.2 + 0 * z, 0.9 + 0 * z)

        starts = torch.tensor([[[-1.0], [1.0]], [[-1.0], [1.0]]])
        assert project(Two(), torch.tensor([[0.25], [0.8]]), starts, 2).tolist() == [[-1.0], [1.0]]

    def test_seeds(self) -> None:
        x, made = noise(4, 5).float(), DefenseGAN(3, 2, generator=Affine())
        torch.manual_seed(0)
        first = made.transform(x)
        assert made.random
        assert not torch.equal(made.transform(x), first)
        seeded = DefenseGAN(3, 2, seed=1, generator=Affine())
        assert not seeded.random
        assert not declared(seeded(nn.Flatten())).random
        assert torch.allclose(seeded.transform(x)[1:3], seeded.transform(x[1:3]), atol=1e-6)
        assert not torch.allclose(DefenseGAN(3, 2, seed=2, generator=Affine()).transform(x), seeded.transform(x))

    def test_it_works_wherever_it_is_called(self) -> None:
        x, seeded = noise(2, 5).float(), DefenseGAN(3, 2, seed=1, generator=Affine())
        with torch.inference_mode():
            inside = seeded.transform(x)
        assert torch.equal(inside.clone(), seeded.transform(x))
        assert seeded.transform(x[:0]).shape == (0, 1, 5, 5)

    def test_settings_and_shapes_that_cannot_be(self) -> None:
        with pytest.raises(UsageError, match="starts must be a whole number at least 1; got 0"):
            DefenseGAN(starts=0)
        with pytest.raises(UsageError, match="attribute latent, a whole number; got Linear without"):
            DefenseGAN(generator=nn.Linear(1, 1))
        plain = type("Plain", (), {"latent": 3})()
        with pytest.raises(UsageError, match="must be a torch module with the attribute latent, or None; got Plain"):
            DefenseGAN(generator=plain)
        with pytest.raises(ModelError, match=r"makes inputs of shape \(1, 28, 28\); got \(3, 32, 32\)"):
            DefenseGAN().transform(torch.zeros(1, 3, 32, 32))

    def test_the_bundled_generator_makes_clothes(self) -> None:
        x = fashion()[0][:16]
        out = DefenseGAN(seed=0).transform(x)
        assert float((out - x).square().mean()) < 0.3 * float((x - x.mean(0)).square().mean())


def test_a_bundled_net_is_named_alike_whoever_loads_it() -> None:
    assert DefenseGAN(generator=load_generative("fashion-generator")) == DefenseGAN()
    density = load_generative("fashion-pixelcnn")
    assert isinstance(density, PixelCNN)
    assert PixelDefend(net=density) == PixelDefend()
    assert DefenseGAN(generator=Generator()) != DefenseGAN()


@pytest.mark.parametrize("make", [lambda: DefenseGAN(2, 1, seed=0), lambda: PixelDefend(net=density())])
def test_a_first_call_in_inference_mode_spoils_nothing(make: Callable[[], Defense]) -> None:
    defense = make()
    size = 28 if isinstance(defense, DefenseGAN) else SIZE
    with torch.inference_mode():
        defense.transform(noise(1, size).float())
    assert not any(p.is_inference() for p in defense._kept.parameters())


@pytest.mark.parametrize("name", ["fashion-pixelcnn", "fashion-generator"])
def test_loading_draws_nothing_from_the_global_generator(name: str) -> None:
    before = torch.get_rng_state()
    load_generative(name)
    assert torch.equal(torch.get_rng_state(), before)


def test_generative_nets_are_kept_with_their_digest(tmp_path: Path) -> None:
    small = Generator(4, 8, 8)
    path = save_generative(
        small, "demo", arch="generator", settings={"latent": 4, "first": 8, "second": 8}, recipe="r", numbers={}, folder=tmp_path
    )  # fmt: skip
    again = load_generative("demo", folder=tmp_path)
    z = torch.randn(2, 4)
    assert torch.allclose(again(z), small(z), atol=1e-2)
    assert not any(p.requires_grad for p in again.parameters())
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ModelError, match="The files were changed"):
        load_generative("demo", folder=tmp_path)
    with pytest.raises(ModelError, match="no generative net"):
        save_generative(small, "x", arch="vae", settings={}, recipe="", numbers={}, folder=tmp_path)
    with pytest.raises(ModelError, match="no bundled model 'none'"):
        load_generative("none")


@pytest.mark.parametrize(("text", "steps"), [("pixel-defend", 3), ("defense-gan:20:2:seed=0", 20)])
def test_the_declared_stand_in_breaks_what_hides_the_gradient(text: str, steps: int) -> None:
    model = parse(text)(net())
    found = declared(model)
    x, y = fashion(8)
    threat = mohs.Threat(mohs.Linf(0.2))
    out = mohs.attack(PGD(steps=steps), model, x, y, threat, guide=found.guide, average=1)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        right = model(x).argmax(1) == y
    assert int((right & ~out.success).sum()) <= int(right.sum()) - 2


def test_evaluated_whole() -> None:
    model = defenses.DefenseGAN(steps=4, starts=1, seed=0)(net())
    x, y = fashion(8)
    record = mohs.evaluate(model, mohs.data.Dataset(x[:4], y[:4]), "linf:0.1", plan="quick", control=0)
    assert record.header.status == "complete"
    assert record.robust_accuracy <= 2 / 4

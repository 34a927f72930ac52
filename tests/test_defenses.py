"""What holds for every defense: it is declared honestly, changes nothing it should not, and its guide answers as it does."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from defended_nets import CONTROLS, OTHERS, TRANSFORMS, every, fashion, net, quilting
from torch import Tensor, nn

import mohs
from mohs import defenses
from mohs.attacks import PGD
from mohs.defenses import DETECTORS, REGISTRY, BitDepth, Defended, Defense, Honest, NoiseInput, Stack, declared
from mohs.errors import ModelError, UsageError

ALL = every()
KINDS: dict[str, type[Defense]] = {**REGISTRY, **DETECTORS}
NAMES = sorted(KINDS)


def answers(model: nn.Module, x: Tensor, seed: int = 0) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model(x)


def test_every_defense_is_here_and_exported() -> None:
    assert sorted(ALL) == NAMES
    assert all(getattr(defenses, kind.__name__) is kind for kind in KINDS.values())


@pytest.mark.parametrize("name", NAMES)
def test_docstring_says_what_it_must(name: str) -> None:
    text = KINDS[name].__doc__ or ""
    assert all(part in text for part in ("Cost:", "**Differs from the paper**", "**Source**"))
    assert ("negative control" in text) == (name in CONTROLS)


@pytest.mark.parametrize("name", NAMES)
class TestContract:
    def test_the_guide_answers_bit_for_bit(self, name: str) -> None:
        model, x = ALL[name], fashion()[0][:8]
        guide = Honest(model)
        with torch.no_grad():
            deployed = answers(model, x)
            assert torch.equal(answers(guide, x), deployed)
        assert torch.equal(answers(guide, x.clone().requires_grad_()).detach(), deployed)
        assert torch.equal(answers(model, x.clone().requires_grad_()).detach(), deployed)

    def test_the_guide_has_a_gradient_for_every_row_the_model_decides(self, name: str) -> None:
        x = fashion()[0][:8].clone().requires_grad_()
        z = answers(declared(ALL[name]).guide or ALL[name], x)
        (g,) = torch.autograd.grad((z * torch.linspace(-1, 1, z.shape[1])).sum(), x)
        assert bool(g.isfinite().all())
        assert bool((g.flatten(1).abs().sum(1) > 0).all())

    def test_chance_is_declared(self, name: str) -> None:
        model, x = ALL[name], fashion()[0][:8]
        with torch.no_grad():
            differs = not torch.equal(answers(model, x, 1), answers(model, x, 2))
        assert differs == declared(model).random

    def test_an_attack_leaves_the_model_as_it_was(self, name: str) -> None:
        model = copy.deepcopy(ALL[name])
        state = {k: v.clone() for k, v in model.state_dict().items()}
        asked = {k: p.requires_grad for k, p in model.named_parameters()}
        x, y = fashion()
        threat = mohs.Threat(mohs.Linf(0.1), draws=1 if declared(model).random else 0)
        mohs.attack(PGD(steps=2), model, x[:4], y[:4], threat, guide=declared(model).guide, average=1)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert {k: p.requires_grad for k, p in model.named_parameters()} == asked
        assert all(p.grad is None for p in model.parameters())
        assert not any(m.training or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not any(getattr(m, "guiding", False) for m in model.modules())

    def test_the_input_is_not_changed_and_its_dtype_kept(self, name: str) -> None:
        x = fashion()[0][:2].double()
        model, before = copy.deepcopy(ALL[name]).double(), x.clone()
        with torch.no_grad():
            z = model(x)
        assert torch.equal(x, before)
        assert z.dtype == torch.float64
        assert z.shape == (2, 11 if declared(model).rejects else 10)

    def test_no_rows_are_no_trouble(self, name: str) -> None:
        with torch.no_grad():
            assert ALL[name](fashion()[0][:0]).shape[0] == 0

    def test_configuration_is_a_short_text(self, name: str) -> None:
        (outermost, *_) = declared(ALL[name]).defenses
        assert dataclasses.is_dataclass(outermost)
        assert len(repr(outermost)) < 120
        assert outermost == copy.deepcopy(outermost)
        assert hash(outermost) == hash(copy.deepcopy(outermost))


@pytest.mark.parametrize("name", [n for n in NAMES if not KINDS[n].random])
def test_without_chance_no_generator_is_touched_and_rows_are_alone(name: str) -> None:
    model, x = ALL[name], fashion()[0][:8]
    before = torch.get_rng_state()
    with torch.no_grad():
        together, alone = model(x), torch.cat([model(row.unsqueeze(0)) for row in x])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-3 if name != "logit-rounding" else 0.11)


@pytest.mark.parametrize("name", [*TRANSFORMS, "quilting", "gradient-noise", "gradient-truncation", "detach"])
def test_a_transformation_keeps_shape_dtype_and_device(name: str) -> None:
    defense = quilting() if name == "quilting" else (TRANSFORMS | CONTROLS)[name]
    for dtype in (torch.float32, torch.float64):
        x = fashion()[0][:3].to(dtype)
        out = defense.transform(x)
        assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)


@pytest.mark.parametrize("name", [n for n in [*TRANSFORMS, "crop-ensemble"] if n not in ("bit-depth", "noise-input")])
def test_colours_are_welcome_and_vectors_are_not(name: str) -> None:
    defense = (TRANSFORMS | OTHERS)[name]
    x = torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(0))
    assert defense.transform(x).shape == x.shape
    with pytest.raises(ModelError, match=r"images \[B, C, H, W\]; got inputs of shape \(2, 7\)"):
        defense.transform(torch.rand(2, 7))


@pytest.mark.parametrize("name", ["jpeg", "total-variation", "non-local-means"])
def test_another_box_is_refused_and_a_little_noise_is_clipped(name: str) -> None:
    defense, x = TRANSFORMS[name], fashion()[0][:2]
    assert type(defense).unit
    assert declared(ALL[name]).unit
    with pytest.raises(ModelError, match=r"needs inputs in \[0, 1\]; got values from 0 to 255"):
        defense.transform(x * 255)
    torch.manual_seed(0)
    inside = defense.transform((x + 0.3).clamp(0, 1))
    torch.manual_seed(0)
    assert torch.equal(defense.transform(x + 0.3), inside)


class TestDefended:
    def test_modes_inside_are_left_alone(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
        model[1].train()
        defended = BitDepth(3)(model)
        assert (defended.training, model.training, model[0].training, model[1].training) == (False, False, False, True)
        assert BitDepth(3)(nn.Linear(2, 2)).training

    def test_only_ensembles_take_more_than_one(self) -> None:
        with pytest.raises(UsageError, match="BitDepth defends one model; got 2"):
            BitDepth(3)(nn.Linear(2, 2), nn.Linear(2, 2))
        with pytest.raises(UsageError, match="MajorityVote needs at least two models; got 1"):
            defenses.MajorityVote()(nn.Linear(2, 2))

    def test_an_undefended_model_declares_nothing(self) -> None:
        found = declared(net())
        assert (found.defenses, found.guide, found.random, found.unit, found.rejects) == ((), None, False, False, False)

    def test_smooth_ones_need_no_guide(self) -> None:
        assert declared(NoiseInput(0.1)(net())).guide is None
        assert declared(defenses.GaussianBlur()(BitDepth(3)(net()))).guide is not None


class TestStack:
    def test_data_pass_in_the_order_written(self) -> None:
        class Double(Defense):
            def transform(self, x: Tensor) -> Tensor:
                return 2 * x

        class Add(Defense):
            def transform(self, x: Tensor) -> Tensor:
                return x + 1

        x = torch.tensor([[1.0, 3.0]])
        assert Stack(Double(), Add())(nn.Identity())(x).tolist() == [[3.0, 7.0]]
        assert Stack(Add(), Double())(nn.Identity())(x).tolist() == [[4.0, 8.0]]
        assert isinstance(Stack()(nn.Identity()), nn.Identity)

    def test_the_inner_one_may_be_an_ensemble(self) -> None:
        model = Stack(BitDepth(3), defenses.RejectDisagreement())(net(), net("pgd"))
        assert model(fashion()[0][:2]).shape == (2, 11)
        assert declared(model).rejects
        assert not declared(defenses.MeanLogits()(model, model)).rejects

    def test_gradients_pass_both(self) -> None:
        model = Stack(BitDepth(4), defenses.JPEG(60), defenses.LogitRounding(1))(net())
        assert [type(d).__name__ for d in declared(model).defenses] == ["BitDepth", "JPEG", "LogitRounding"]
        assert isinstance(model, Defended)
        x, y = fashion(32)
        out = mohs.attack(PGD(steps=20), model, x, y, "linf:0.1", guide=declared(model).guide)
        assert out.success.float().mean() > 0.9
        assert bool((model(out.x[out.success]).argmax(1) != y[out.success]).all())


REFUSED = {
    "bits": lambda: BitDepth(9),
    "quality": lambda: defenses.JPEG(0),
    "whole": lambda: defenses.JPEG(75.0),  # type: ignore[arg-type]
    "sigma": lambda: defenses.GaussianBlur(0.0),
    "not a number": lambda: NoiseInput(float("nan")),
    "even": lambda: defenses.MedianBlur(4),
    "window of one": lambda: defenses.MeanBlur(1),
    "least above most": lambda: defenses.RandomResizePad(1.0, 0.9),
    "share": lambda: defenses.CropEnsemble(10, 1.5),
    "crops": lambda: defenses.CropEnsemble(0),
    "keep": lambda: defenses.TotalVariation(0.0),
    "strength": lambda: defenses.NonLocalMeans(-1.0),
    "levels": lambda: defenses.Thermometer(1),
    "draws": lambda: defenses.ActivationPruning(0.0),
    "ratio": lambda: defenses.KWinners(0.0),
    "factor": lambda: defenses.LogitScale(0.0),
    "step": lambda: defenses.GradientTruncation(0.0),
    "scale": lambda: defenses.GradientNoise(True),
    "decimals": lambda: defenses.LogitRounding(7),
    "bank of images": lambda: defenses.Quilting(torch.zeros(3, 5, 5)),
    "overlap": lambda: defenses.Quilting(torch.zeros(3, 1, 5, 5), overlap=5),
    "more neighbours than patches": lambda: defenses.Quilting(torch.zeros(3, 1, 5, 5)),
    "delta of whole numbers": lambda: defenses.DefensivePerturbation(torch.zeros(2, dtype=torch.int64)),
    "delta that is not finite": lambda: defenses.DefensivePerturbation(torch.tensor([float("inf")])),
    "empty box": lambda: defenses.DefensivePerturbation(torch.zeros(2), box=(1.0, 1.0)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_settings_that_cannot_be_are_refused(what: str) -> None:
    with pytest.raises(UsageError, match="got"):
        REFUSED[what]()

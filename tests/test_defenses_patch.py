"""The defenses against patches: blocks against a plain loop, and planted squares that must be found."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from defended_nets import fashion, net
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import restoration
from torch import Tensor, nn

import mohs
from mohs import defenses
from mohs.attacks import PGD, LaVAN
from mohs.defenses import BitDepth, DigitalWatermarking, LocalGradientsSmoothing, declared
from mohs.defenses._base import Honest
from mohs.defenses.digital_watermarking import guided, paint, saliency
from mohs.errors import AccessError, ModelError, UsageError
from mohs.gradients import BeforeSoftmax, Straight, Through
from mohs.guide import Guide, answers_for
from mohs.threat import Access


def smoothed(image: np.ndarray, strength: float, threshold: float, block: int, overlap: int) -> np.ndarray:
    """The defense on one image [C, H, W], pixel by pixel and block by block."""
    grey = image.mean(0)
    height, width = grey.shape
    g = np.zeros_like(grey)
    for i in range(height):
        for j in range(width):
            down = grey[i + 1, j] - grey[i, j] if i + 1 < height else 0.0
            across = grey[i, j + 1] - grey[i, j] if j + 1 < width else 0.0
            g[i, j] = math.hypot(down, across)
    if g.max() > g.min():
        g = (g - g.min()) / (g.max() - g.min())
    covered = np.zeros_like(grey)
    top = 0
    while True:
        top = min(top, max(height - block, 0))
        left = 0
        while True:
            left = min(left, max(width - block, 0))
            here = (slice(top, top + block), slice(left, left + block))
            if g[here].mean() > threshold:
                covered[here] = 1.0
            if left + block >= width:
                break
            left += block - overlap
        if top + block >= height:
            break
        top += block - overlap
    return image * (1 - np.clip(strength * g * covered, 0, 1))


class TestLocalGradientsSmoothing:
    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 10**6),
        shape=st.sampled_from([(1, 9, 9), (3, 8, 11), (2, 13, 7)]),
        block=st.integers(1, 15),
        share=st.floats(0, 0.99),
        threshold=st.sampled_from([0.0, 0.2, 0.4, 0.6]),
    )
    def test_it_is_what_a_plain_loop_does(
        self, seed: int, shape: tuple[int, int, int], block: int, share: float, threshold: float
    ) -> None:
        x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x[1, :, :4] = 0.5  # flat in part
        overlap = int(share * block)
        out = LocalGradientsSmoothing(1.7, threshold, block, overlap).transform(x)
        for row, image in zip(out, x):
            assert np.allclose(row, smoothed(image.numpy(), 1.7, threshold, block, overlap), atol=1e-12)

    def test_the_last_rows_and_columns_are_guarded(self) -> None:
        x = torch.zeros(1, 1, 28, 28)
        x[..., -4:, -4:] = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)).round()
        out = LocalGradientsSmoothing(threshold=0.02).transform(
            x
        )  # 15 + 10 = 25: three pixels beyond a grid of strides
        assert float(out[..., :-1, :-1].sum()) < 0.1 * float(x.sum())  # the corner has no next pixel

    def test_a_constant_image_stays_as_it_is(self) -> None:
        x = torch.full((2, 3, 6, 6), 0.7)
        assert torch.equal(LocalGradientsSmoothing(block=3, overlap=1).transform(x), x)

    def test_the_stand_in_has_half_the_gradient_of_each(self) -> None:
        defense = LocalGradientsSmoothing(1.0, 0.3, 3, 1)
        x = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(defense.transform, (x,))
        w = torch.linspace(-1, 1, 36, dtype=torch.float64).view(1, 1, 6, 6)
        (own,) = torch.autograd.grad((defense.transform(x) * w).sum(), x)
        (half,) = torch.autograd.grad((defense.prepare(x, guiding=True) * w).sum(), x)
        assert torch.allclose(half, (own + w) / 2)
        assert torch.equal(defense.prepare(x, guiding=True), defense.transform(x))

    @pytest.mark.parametrize(
        "wrong", [{"strength": 0}, {"threshold": 1.5}, {"block": 0}, {"overlap": 15}, {"overlap": -1}], ids=str
    )
    def test_settings_that_cannot_be(self, wrong: dict[str, float]) -> None:
        with pytest.raises(UsageError, match=next(iter(wrong))):
            LocalGradientsSmoothing(**wrong)


class Attentive(nn.Module):
    """Its answer follows one square of the image much more than the rest, through a ReLU."""

    def __init__(self, top: int, left: int, side: int, size: int = 16) -> None:
        super().__init__()
        weight = 0.02 * torch.rand(size, size, generator=torch.Generator().manual_seed(0))
        weight[top : top + side, left : left + side] = 1.0
        self.register_buffer("weight", weight)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        score = self.act((x * self.weight).flatten(1)).sum(1)
        return torch.stack([torch.full_like(score, 0.5), score], 1)


class TestDigitalWatermarking:
    @pytest.mark.parametrize(("top", "left"), [(5, 6), (0, 0), (12, 12), (0, 9)])
    def test_a_planted_square_is_found_and_painted_over(self, top: int, left: int) -> None:
        model = Attentive(top, left, 4).eval()
        x = torch.full((2, 1, 16, 16), 0.3)
        x[1, :, top : top + 4, left : left + 4] = 1.0
        mask = DigitalWatermarking().mask(model, x)
        want = torch.zeros(16, 16, dtype=torch.bool)
        want[max(top - 1, 0) : top + 5, max(left - 1, 0) : left + 5] = True  # grown by a brush of three
        assert torch.equal(mask[1], want)
        seen: list[Tensor] = []
        model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
        with torch.no_grad():
            DigitalWatermarking()(model).eval()(x)
        assert torch.allclose(seen[-1][1], torch.full((1, 16, 16), 0.3), atol=1e-5)

    def test_scattered_and_thin_pixels_are_no_patch(self) -> None:
        defense, s = DigitalWatermarking(), np.zeros((16, 16))
        s[::5, ::5] = 1.0
        assert not defense.clusters(s).any()
        s[8, :] = 1.0  # a line is thinner than the brush
        assert not defense.clusters(s).any()
        s[4:9, 4:9] = 1.0
        found = defense.clusters(s)
        assert found[3:10, 3:10].all()
        assert found[:, 12:].sum() == found[12:].sum() == 0

    def test_a_sparse_cluster_is_no_patch(self) -> None:
        s = np.zeros((16, 16))
        s[3:12:2, 3:12:2] = 1.0  # a quarter of the square: closing joins them
        assert not DigitalWatermarking(density=0.7).clusters(s).any()
        assert DigitalWatermarking(density=0.2).clusters(s)[4:11, 4:11].all()

    def test_guided_gradients_against_a_loop_over_layers(self) -> None:
        model, x = net(), fashion()[0][:3]
        a = [x]
        for layer in model:
            a.append(layer(a[-1]).detach())
        top = a[-1].argmax(1)
        g = torch.zeros_like(a[-1]).scatter_(1, top.unsqueeze(1), 1.0)
        for layer, before in zip(reversed(model), reversed(a[:-1])):
            if isinstance(layer, nn.ReLU):
                g = g.clamp_min(0) * (before > 0)
            else:
                point = before.clone().requires_grad_()
                (g,) = torch.autograd.grad(layer(point), point, g)
        want = g.abs().amax(1)
        want /= want.amax((1, 2), keepdim=True)
        torch.testing.assert_close(saliency(model, x), want, rtol=1e-4, atol=1e-6)
        with torch.inference_mode():
            assert torch.allclose(saliency(model, x.clone()), want, rtol=1e-3, atol=1e-5)

    def test_hooks_are_gone_even_where_the_model_raises(self) -> None:
        model = nn.Sequential(nn.ReLU(), nn.Linear(3, 2))
        with pytest.raises(RuntimeError), guided(model):
            model(torch.zeros(1, 5))
        assert not any(m._forward_hooks for m in model.modules())

    def test_a_known_place_needs_no_gradient(self) -> None:
        class Sum(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.stack([x.detach().flatten(1).sum(1), torch.ones(len(x))], 1)

        x = torch.full((2, 3, 9, 9), 0.25)
        x[:, :, 2:5, 3:6] = 1.0
        known = DigitalWatermarking(row=2, column=3, side=3)(Sum().eval())
        assert torch.allclose(known(x)[:, 0], torch.tensor(0.25 * 243), rtol=1e-5)
        with pytest.raises(ModelError, match=r"there is none .* outside of it .* a known place"):
            DigitalWatermarking()(Sum().eval())(x)
        for row, column in ((9, 0), (0, 9)):
            with pytest.raises(ModelError, match="the images have 9 x 9 pixels"):
                DigitalWatermarking(row=row, column=column, side=3)(Sum().eval())(x)

    @pytest.mark.parametrize(
        "make",
        [Honest, Straight, lambda m: Straight(Honest(m), custom=True), lambda m: Through(m, {"model": None})],
        ids=["honest", "straight", "custom", "through"],
    )
    def test_no_guide_changes_what_is_painted_over(self, make: object) -> None:
        # with gradients the mask would be another one: rounded inputs have none, so that the deployed model paints nothing
        model = DigitalWatermarking(density=0.1)(BitDepth(3)(net())).eval()
        x = fashion()[0][:12].clone().requires_grad_(True)
        guide = make(model)
        with torch.no_grad():
            assert not torch.equal(DigitalWatermarking(density=0.1)(net())(x), net()(x)), "there is something to paint"
        assert torch.equal(guide(x).detach(), model(x).detach())
        assert not answers_for(guide, model)
        assert answers_for(make(known := DigitalWatermarking(row=1, column=1, side=2)(net())), known)

    def test_logits_before_the_softmax_are_those_of_the_answer(self) -> None:
        model = DigitalWatermarking()(nn.Sequential(net(), nn.Softmax(1)).eval()).eval()
        x = fashion()[0][:4].clone().requires_grad_(True)
        found = BeforeSoftmax(model)(x)
        assert torch.equal(found.softmax(1).detach(), model(x).detach())

    def test_the_deployed_model_judges_what_a_guide_reports(self) -> None:
        class Wrong(Guide):
            def forward(self, x: Tensor) -> Tensor:
                return -self.model(x)

        blind, x = DigitalWatermarking()(net()).eval(), fashion(8)[0]
        y = blind(x).argmax(1).detach()
        out = mohs.attack(PGD(steps=2), blind, x, y, "linf:0.0", guide=Wrong(Honest(blind)))
        assert not bool(out.success.any())
        with pytest.raises(AccessError):
            mohs.attack(
                PGD(steps=2), blind, x, y, mohs.Threat(mohs.Linf(0.1), access=Access.LOGIT), guide=Wrong(Honest(blind))
            )

    def test_painting_is_the_biharmonic_inpainting_of_each_image(self) -> None:
        x = fashion()[0][:3]
        mask = torch.zeros(3, 28, 28, dtype=torch.bool)
        mask[0, 8:14, 9:15] = True
        mask[2] = True
        out = paint(x, mask)
        want = restoration.inpaint_biharmonic(x[0, 0].double().numpy(), mask[0].numpy())
        assert np.allclose(out[0, 0], want, atol=1e-6)
        assert torch.equal(out[0][:, ~mask[0]], x[0][:, ~mask[0]])
        assert torch.equal(out[1], x[1])
        assert not out[2].any()

    def test_the_identity_stands_in_for_all_of_it(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
        defended = DigitalWatermarking(row=1, column=1, side=3)(model).eval()
        x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        guide = declared(defended).guide
        assert guide is not None
        (g,) = torch.autograd.grad(guide(x)[:, 0].sum(), x)
        assert torch.allclose(g, model[1].weight[0].view(1, 1, 8, 8).expand_as(g))
        assert (
            not defended(x).requires_grad or not torch.autograd.grad(defended(x)[:, 0].sum(), x, allow_unused=True)[0]
        )

    @pytest.mark.parametrize(
        "wrong",
        [{"threshold": -1}, {"brush": 0}, {"density": 2}, {"row": 3}, {"row": 1, "column": 2, "side": 0}],
        ids=str,
    )
    def test_settings_that_cannot_be(self, wrong: dict[str, int]) -> None:
        with pytest.raises(UsageError):
            DigitalWatermarking(**wrong)


def test_both_are_written_as_texts() -> None:
    assert defenses.parse("local-gradients-smoothing:2.3:0.2:5:2") == LocalGradientsSmoothing(2.3, 0.2, 5, 2)
    assert defenses.parse("digital-watermarking") == DigitalWatermarking()
    assert defenses.parse("digital-watermarking:row=3:column=4:side=5") == DigitalWatermarking(row=3, column=4, side=5)


@pytest.mark.parametrize(
    "defense",
    [LocalGradientsSmoothing(block=5, overlap=2, threshold=0.2), DigitalWatermarking()],
    ids=lambda d: type(d).__name__,
)
def test_what_they_declare_breaks_them_where_a_transferred_patch_does_not(defense: defenses.Defense) -> None:
    x, y = fashion(20)
    model = defense(net()).eval()
    with torch.no_grad():
        clean = float((model(x).argmax(1) == y).double().mean())
        naive = mohs.attack(LaVAN(steps=30, windows=6), net(), x, y, "patch:5", stop=mohs.Stop.BUDGET)
        left = float((model(naive.x).argmax(1) == y).double().mean())
    out = mohs.attack(LaVAN(steps=30, windows=6), model, x, y, "patch:5", guide=declared(model).guide)
    adaptive = float((~out.success).double().mean())
    assert clean > 0.7
    assert adaptive <= 0.3
    assert adaptive < left + 0.04


def test_pgd_follows_the_stand_in_too() -> None:
    x, y = fashion(16)
    model = LocalGradientsSmoothing()(net()).eval()
    out = mohs.attack(PGD(steps=20), model, x, y, "patch:8", guide=declared(model).guide, restarts=5)
    assert float(out.success.double().mean()) > 0.8

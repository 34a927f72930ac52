"""What the transformations do to an image, against Pillow, scipy, scikit-image and plain loops."""

from __future__ import annotations

import io
import itertools
import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.optimize
import torch
from defended_nets import fashion
from PIL import Image
from skimage import restoration
from torch import Tensor, nn

from mohs import defenses
from mohs.defenses.quilting import _beyond
from mohs.errors import ModelError, UsageError


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class TestJpeg:
    def test_grey_is_what_pillow_makes_of_it(self) -> None:
        x = fashion()[0][:4]
        for quality in (10, 75, 100):
            ours = defenses.JPEG(quality).transform(x)
            for row, out in zip(x, ours):
                file = io.BytesIO()
                Image.fromarray((row[0].numpy().astype(np.float64) * 255 + 0.5).astype(np.uint8), "L").save(
                    file, "JPEG", quality=quality
                )
                assert np.array_equal(np.round(out[0].numpy() * 255), np.asarray(Image.open(file)))

    def test_colours_are_coded_together(self) -> None:
        x = pictures(1, 3, 16, 24)
        file = io.BytesIO()
        Image.fromarray(np.rint(x[0].permute(1, 2, 0).numpy().astype(np.float64) * 255).astype(np.uint8), "RGB").save(
            file, "JPEG", quality=50
        )
        expected = np.asarray(Image.open(file))
        ours = defenses.JPEG(50).transform(x)[0].permute(1, 2, 0).numpy()
        assert np.array_equal(np.round(ours * 255), expected)

    def test_other_numbers_of_channels_are_grey_images(self) -> None:
        x = pictures(2, 2, 8, 8)
        each = torch.cat([defenses.JPEG(30).transform(x[:, c : c + 1]) for c in range(2)], 1)
        assert torch.equal(defenses.JPEG(30).transform(x), each)


class TestBlurs:
    @pytest.mark.parametrize("sigma", [0.5, 1.0, 2.3])
    def test_gaussian(self, sigma: float) -> None:
        x = pictures(2, 3, 9, 13).double()
        expected = scipy.ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4.0)
        assert np.allclose(defenses.GaussianBlur(sigma).transform(x).numpy(), expected, atol=1e-12)

    @pytest.mark.parametrize("size", [3, 5])
    def test_mean_and_median(self, size: int) -> None:
        x = pictures(2, 3, 9, 13).double()
        mean = scipy.ndimage.uniform_filter(x.numpy(), (1, 1, size, size), mode="nearest")
        median = scipy.ndimage.median_filter(x.numpy(), (1, 1, size, size), mode="nearest")
        assert np.allclose(defenses.MeanBlur(size).transform(x).numpy(), mean, atol=1e-12)
        assert np.array_equal(defenses.MedianBlur(size).transform(x).numpy(), median)

    def test_their_gradients_are_exact(self) -> None:
        x = pictures(1, 2, 5, 6, seed=3).double().requires_grad_()
        for defense in (defenses.GaussianBlur(0.8), defenses.MeanBlur(3), defenses.MedianBlur(3)):
            assert torch.autograd.gradcheck(defense.transform, (x,))


class TestRandomResizePad:
    def test_each_image_is_resized_and_put_somewhere(self) -> None:
        x = pictures(40, 1, 10, 10) * 0.9 + 0.1  # nowhere black
        torch.manual_seed(1)
        out = defenses.RandomResizePad(0.7, 1.2, size=13).transform(x)
        sizes, places = set(), set()
        for row, shown in zip(x[:, 0], out[:, 0]):
            lit = shown > 0
            rows, columns = lit.any(1).nonzero().flatten(), lit.any(0).nonzero().flatten()
            r, top, left = len(rows), int(rows[0]), int(columns[0])
            assert r == len(columns)
            assert lit.sum() == r * r
            for i, j in itertools.product(range(r), repeat=2):
                assert shown[top + i, left + j] == row[math.floor(i * 10 / r), math.floor(j * 10 / r)]
            sizes.add(r)
            places.add((top, left))
        assert sizes == set(range(7, 13))
        assert len(places) > 15

    def test_at_full_size_nothing_happens(self) -> None:
        x = pictures(3, 2, 7, 9)
        assert torch.equal(defenses.RandomResizePad(1.0).transform(x), x)

    def test_what_does_not_fit_is_refused(self) -> None:
        with pytest.raises(ModelError, match="a side of 10 pixels to 12, which does not fit into 11"):
            defenses.RandomResizePad(1.0, 1.2, size=11).transform(pictures(1, 1, 10, 10))

    def test_its_gradient_is_exact(self) -> None:
        def fixed(x: Tensor) -> Tensor:
            torch.manual_seed(0)
            return defenses.RandomResizePad(0.6).transform(x)

        assert torch.autograd.gradcheck(fixed, (pictures(2, 1, 5, 5).double().requires_grad_(),))


class TestCropEnsemble:
    def test_it_is_the_mean_of_probabilities_over_crops(self) -> None:
        x = pictures(2, 1, 8, 8)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
        defense = defenses.CropEnsemble(400, 0.75)
        crops = [
            nn.functional.interpolate(x[:, :, i : i + 6, j : j + 6], (8, 8), mode="bilinear", align_corners=False)
            for i, j in itertools.product(range(3), repeat=2)
        ]
        exact = torch.stack([model(c).softmax(1) for c in crops])
        torch.manual_seed(0)
        ours = defense(model)(x).exp()
        assert torch.allclose(ours.sum(1), torch.ones(2), atol=1e-5)
        assert (ours - exact.mean(0)).abs().max() < 5 * exact.std(0).max() / math.sqrt(400)
        one = defenses.CropEnsemble(1, 0.75)(model)(x).exp()
        assert all(any(torch.allclose(p, q, atol=1e-6) for q in exact[:, row]) for row, p in enumerate(one))


class TestDenoising:
    def test_total_variation_without_a_mask_is_the_librarys(self) -> None:
        x = pictures(2, 1, 8, 8).double()
        ours = defenses.TotalVariation(1.0, 0.1, rounds=1).transform(x)
        for row, out in zip(x, ours):
            assert np.allclose(out[0], restoration.denoise_tv_chambolle(row[0].numpy(), weight=0.025))

    def test_total_variation_with_a_mask_comes_to_the_minimum(self) -> None:
        x, weight = fashion()[0][:1, :, 10:18, 10:18].double(), 0.3
        torch.manual_seed(0)
        kept = np.random.default_rng(int(torch.randint(1 << 62, ()).item())).random((8, 8)) < 0.5

        def cost(flat: np.ndarray, soft: float = 0.0) -> tuple[float, np.ndarray]:
            z = torch.tensor(flat.reshape(8, 8), requires_grad=True)
            down = torch.cat([z[1:] - z[:-1], torch.zeros_like(z[:1])])
            right = torch.cat([z[:, 1:] - z[:, :-1], torch.zeros_like(z[:, :1])], 1)
            data = ((z - x[0, 0]) ** 2)[torch.from_numpy(kept)].sum()
            value = data + weight / 2 * (down**2 + right**2 + soft).sqrt().sum()
            return value.item(), torch.autograd.grad(value, z)[0].numpy().ravel() if soft else np.zeros(64)

        exact = scipy.optimize.minimize(cost, x.numpy().ravel(), args=(1e-8,), jac=True, options={"maxiter": 3000})
        costs = []
        for rounds in (1, 5, 100):
            torch.manual_seed(0)
            costs.append(cost(defenses.TotalVariation(0.5, weight, rounds).transform(x)[0, 0].numpy())[0])
        assert costs[0] > 1.05 * costs[1] > costs[2]
        assert costs[2] < 1.02 * exact.fun

    def test_all_channels_lose_the_same_pixels(self) -> None:
        x = pictures(1, 1, 8, 8).expand(-1, 3, -1, -1)
        out = defenses.TotalVariation(0.5).transform(x)
        assert torch.allclose(out[:, 0], out[:, 1])
        assert torch.allclose(out[:, 0], out[:, 2])

    def test_non_local_means_is_the_librarys(self) -> None:
        x = pictures(1, 3, 9, 9).double()
        ours = defenses.NonLocalMeans(0.2, 3, 4).transform(x)[0].permute(1, 2, 0).numpy()
        theirs = restoration.denoise_nl_means(
            x[0].permute(1, 2, 0).numpy(), patch_size=3, patch_distance=4, h=0.2, channel_axis=-1
        )
        assert np.allclose(ours, theirs)

    @pytest.mark.parametrize(
        "settings", [{}, {"strength": 0.2, "patch": 5, "search": 3}, {"patch": 2}, {"patch": 1, "search": 2}]
    )
    def test_the_stand_in_is_the_same_mean(self, settings: dict[str, float]) -> None:
        """The library takes a table for exp and leaves weights below e^-5 out, so they differ a little."""
        defense = defenses.NonLocalMeans(**settings)
        for x in (fashion()[0][:4], 0.4 + 0.2 * pictures(1, 3, 20, 24)):
            there = defense.transform(x)
            assert (defense.stand_in(x) - there).abs().mean() < 0.05 * (x - there).abs().mean()

    def test_the_stand_in_has_the_gradient_of_its_values(self) -> None:
        x = pictures(1, 2, 5, 6).double().requires_grad_(True)
        assert torch.autograd.gradcheck(defenses.NonLocalMeans(0.3, search=2).stand_in, (x,), fast_mode=True)

    def test_a_missing_library_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "skimage.restoration", None)
        with pytest.raises(UsageError, match=r'NonLocalMeans needs scikit-image.*pip install "mohs\[images\]"'):
            defenses.NonLocalMeans().transform(pictures(1, 1, 8, 8))


class TestQuilting:
    def test_patches_of_the_image_itself_give_it_back(self) -> None:
        x = pictures(2, 2, 11, 9)
        bank = x.unfold(2, 4, 1).unfold(3, 4, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 2, 4, 4)
        assert torch.equal(defenses.Quilting(bank, overlap=2, neighbours=1).transform(x), x)

    def test_every_pixel_comes_from_a_patch(self) -> None:
        bank = torch.tensor([0.25, 0.5]).view(2, 1, 1, 1).expand(-1, 1, 3, 3).contiguous()
        out = defenses.Quilting(bank, overlap=1, neighbours=2).transform(pictures(3, 1, 8, 8))
        assert set(out.flatten().tolist()) == {0.25, 0.5}

    def test_the_bank_is_cut_from_the_images(self) -> None:
        x = torch.arange(2 * 2 * 6 * 7, dtype=torch.float32).view(2, 2, 6, 7)
        bank = defenses.Quilting.of(x, patches=50, size=3, neighbours=1).bank
        assert bank.shape == (50, 2, 3, 3)
        corner = bank[:, :1, :1, :1]
        expected = torch.arange(3).view(3, 1) * 7 + torch.arange(3) + torch.tensor([0, 42]).view(2, 1, 1)
        assert torch.equal(bank - corner, expected.float().expand(50, -1, -1, -1))
        assert len(corner.unique()) > 10

    def test_the_cut_is_the_cheapest(self) -> None:
        difference = pictures(6, 4, 3)
        paths = [
            p for p in itertools.product(range(3), repeat=4) if all(abs(a - b) < 2 for a, b in itertools.pairwise(p))
        ]
        for strip, taken in zip(difference, _beyond(difference)):
            best = min(paths, key=lambda p, s=strip: float(sum(s[i, j] for i, j in enumerate(p))))
            assert taken.tolist() == [[j >= cut for j in range(3)] for cut in best]

    def test_images_of_another_kind_are_refused(self) -> None:
        defense = defenses.Quilting.of(pictures(2, 1, 8, 8), patches=20)
        with pytest.raises(ModelError, match=r"patches \(1, 5, 5\); they do not fit into images \(3, 8, 8\)"):
            defense.transform(pictures(1, 3, 8, 8))


class TestNoise:
    def test_its_moments(self) -> None:
        torch.manual_seed(0)
        noise = defenses.NoiseInput(0.2).transform(torch.zeros(50, 400))
        assert abs(float(noise.mean())) < 0.01
        assert abs(float(noise.std()) - 0.2) < 0.01
        assert not torch.equal(noise[0], noise[1])

    def test_a_perturbation_is_added_and_clipped(self) -> None:
        delta = torch.tensor([[0.5, -0.5]])
        x = torch.tensor([[[0.75, 0.25]], [[0.25, 0.75]]])
        assert defenses.DefensivePerturbation(delta).transform(x).tolist() == [[[1.0, 0.0]], [[0.75, 0.25]]]
        assert defenses.DefensivePerturbation(delta, box=None).transform(x).tolist() == [
            [[1.25, -0.25]],
            [[0.75, 0.25]],
        ]
        with pytest.raises(ModelError, match=r"delta of shape \(1, 2\) does not fit inputs of shape \(3,\)"):
            defenses.DefensivePerturbation(delta).transform(torch.zeros(2, 3))
        assert defenses.DefensivePerturbation(delta) != defenses.DefensivePerturbation(-delta)

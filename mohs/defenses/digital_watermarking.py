"""Digital watermarking: patches are found by their saliency, and painted over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mohs.defenses._backward import changed
from mohs.defenses._base import Defense, as_deployed
from mohs.defenses._scikit import restoration
from mohs.defenses._settings import images, number
from mohs.errors import ModelError, UsageError, gist
from mohs.gradients.bpda import instead_of

ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Softplus,
)  # fmt: skip
"""Layers behind which guided backpropagation drops what is negative."""


@dataclass(frozen=True)
class DigitalWatermarking(Defense):
    """Paints over the dense clusters of pixels that speak most for the answer: a patch is one, an object rarely.

        s = max over channels of |guided gradient of the answer's logit|, over its largest value
        hot = s > threshold;  close gaps, drop what is thinner than ``brush``, keep clusters at least ``density`` hot
        x -> inpaint(x, clusters grown by a brush),   answer with the classifier

    With ``row``, ``column`` and ``side`` given it is not blind: that window is painted over, whatever it shows. A patch that
    spreads its saliency, or draws it to somewhere else, is not found. Where pixels are painted over no gradient comes back; the
    identity stands in for all of it, as the next step may uncover them.

    Args:
        threshold: saliency above which a pixel is hot, from 0 to 1.
        brush: side of the square that dilates and erodes, in pixels.
        density: share of hot pixels that a cluster needs, from 0 to 1.
        row, column, side: the first pixel and the side of a window that is known to hold the patch; all or none.

    Raises:
        UsageError: other numbers, or scikit-image is missing (the extra ``images``).
        ModelError: at the first call, on inputs that are no images, a known window outside of them, or a classifier without
            gradients.

    Cost: one more forward and a backward of the classifier per answer, and a linear system per cluster on the CPU, some
    milliseconds for 28 x 28 pixels.

    **Differs from the paper**: the paper gives no numbers for threshold, morphology and density; these are ours, chosen on
    Fashion-MNIST. Clusters are filled by the biharmonic equation, not by Telea's fast marching, which is found in OpenCV only.
    Activations that a model calls as functions, not as layers, pass gradients of both signs.
    **Source**: J. Hayes, "On visible adversarial perturbations and digital watermarking", CVPR workshops 2018, section 4 (non-blind and
    blind); J. Springenberg et al., "Striving for simplicity", ICLR 2015 workshop (guided backpropagation).
    """

    threshold: float = 0.35
    brush: int = 3
    density: float = 0.7
    row: int | None = None
    column: int | None = None
    side: int | None = None
    looks_at_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number(self.threshold, "threshold", 0, 1)
        number(self.brush, "brush", 1, whole=True)
        number(self.density, "density", 0, 1)
        place = {"row": self.row, "column": self.column, "side": self.side}
        given = {name: value for name, value in place.items() if value is not None}
        if given and len(given) < 3:
            raise UsageError(f"A known place needs row, column and side; got {given}. Give all three, or none.")
        for name, value in given.items():
            number(value, name, 1 if name == "side" else 0, whole=True)
        object.__setattr__(self, "looks_at_gradients", not given)

    def answer(self, model: nn.Module, x: Tensor, guiding: bool) -> Tensor:
        """Logits [B, K] of the model on the painted images."""
        value = paint(images(x, "DigitalWatermarking").detach(), self.mask(model, x))
        return model(instead_of(x, value, None) if guiding else value)

    def mask(self, model: nn.Module, x: Tensor) -> Tensor:
        """What is painted over, [B, H, W] bool."""
        if self.row is not None and self.column is not None and self.side is not None:
            if self.row >= x.shape[2] or self.column >= x.shape[3]:
                raise ModelError(
                    f"The known window begins at row {self.row}, column {self.column}; the images have {x.shape[2]} x {x.shape[3]} "
                    "pixels. Give a place inside, counted from 0."
                )
            known = torch.zeros(x.shape[0], *x.shape[2:], dtype=torch.bool, device=x.device)
            known[:, self.row : self.row + self.side, self.column : self.column + self.side] = True
            return known
        found = [self.clusters(s) for s in saliency(model, x).cpu().numpy()]
        return torch.from_numpy(np.stack(found) if found else np.zeros((0, *x.shape[2:]), bool)).to(x.device)

    def clusters(self, s: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The dense clusters of one saliency map [H, W], grown by a brush."""
        from scipy import ndimage  # here, as importing the library must stay quick

        square = np.ones((self.brush, self.brush), bool)
        hot = s > self.threshold
        wide = np.pad(hot, self.brush)  # the image's edge must not erode
        closed = ndimage.binary_erosion(ndimage.binary_dilation(wide, square), square)
        opened = ndimage.binary_dilation(ndimage.binary_erosion(closed, square), square)
        inner = opened[self.brush : -self.brush, self.brush : -self.brush]
        labels, count = ndimage.label(inner, np.ones((3, 3), bool))
        share = ndimage.mean(hot, labels, np.arange(1, count + 1)) if count else np.zeros(0)
        kept = np.isin(labels, 1 + np.flatnonzero(np.asarray(share) >= self.density))
        return ndimage.binary_dilation(kept, square)


def saliency(model: nn.Module, x: Tensor) -> Tensor:
    """The guided gradient of the answer's logit, the largest magnitude of the channels, over that of the image: [B, H, W].

    Raises:
        ModelError: the classifier has no input gradient.
    """
    # the deployed model's own gradients, or the painted places, and with them the answers, would depend on who asks
    with torch.inference_mode(False), torch.enable_grad(), as_deployed(model), guided(model):
        point = x.detach().clone().requires_grad_(True)
        logits = model(point)
        top = logits.detach().argmax(1, keepdim=True)
        try:
            (g,) = torch.autograd.grad(logits.gather(1, top).sum(), point)
        except RuntimeError as error:
            raise ModelError(
                f"DigitalWatermarking looks at the classifier's input gradient, and there is none ({gist(error)}). "
                "What stands between it and the classifier must be differentiable: put codecs and filters without gradient outside "
                "of it ('jpeg,digital-watermarking', not 'digital-watermarking,jpeg'), or give row, column and side of a known place."
            ) from error
    size = g.abs().amax(1)
    return size / size.amax((1, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


@contextmanager
def guided(model: nn.Module) -> Iterator[None]:
    """Inside, negative gradients do not pass the model's activation layers."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return changed(output, lambda g: g.clamp_min(0))

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, ACTIVATIONS)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def paint(x: Tensor, mask: Tensor) -> Tensor:
    """Images [B, C, H, W] with the pixels of ``mask`` [B, H, W] filled from those around; what has no surroundings is 0."""
    fill = restoration("DigitalWatermarking").inpaint_biharmonic
    value = x.clone()
    for row in mask.flatten(1).any(1).nonzero().flatten().tolist():
        area, image = mask[row].cpu().numpy(), x[row].cpu().double().numpy()
        whole = np.zeros_like(image) if area.all() else fill(image, area, channel_axis=0)
        value[row] = torch.where(mask[row], torch.from_numpy(whole).to(x), x[row])
    return value

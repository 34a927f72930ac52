"""Gradients by looking around: where the exact one is missing, or true only for a step too small to matter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mohs import streams
from mohs.errors import UsageError
from mohs.guide import Guide
from mohs.target import classify
from mohs.threat import Access


class _Estimated(torch.autograd.Function):
    """Value as given; the gradient is estimated when it is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, estimate: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.estimate = estimate
        return value.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return ctx.estimate(x, cotangent), None, None


class _Around(Guide, ABC):
    """Common to both: the value is the model's, the gradient comes from ``draws`` points at Gaussian distance ``sigma``."""

    def __init__(self, model: nn.Module, sigma: float, draws: int) -> None:
        super().__init__(model)
        if not sigma > 0:
            raise UsageError(f"sigma must be above 0, in units of the input; got {sigma!r}.")
        if type(draws) is not int or draws < 1:
            raise UsageError(f"draws must be a whole number >= 1; got {draws!r}.")
        self.sigma, self.draws = sigma, draws

    def forward(self, x: Tensor) -> Tensor:
        """The model's logits, bit for bit."""
        with torch.no_grad():
            value = classify(self.model, x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return value
        return _Estimated.apply(x, value, self._estimate)

    def _noise(self, x: Tensor, draw: int) -> Tensor:
        # a function of the point: rows stay independent, a run can be repeated, and the next point gets other directions
        return streams.normal(streams.point_keys(x), tuple(x.shape[1:]), draw, x.dtype)

    @abstractmethod
    def _estimate(self, x: Tensor, cotangent: Tensor) -> Tensor:
        """The gradient of <cotangent, logits> at x, [B, ...]."""

    def extra_repr(self) -> str:
        return f"sigma={self.sigma:g}, draws={self.draws}"


class Smooth(_Around):
    """The gradient averaged over Gaussian noise on the input: that of the smoothed model, at the model's own answer.

        g = mean_i of grad f(x + sigma u_i),   u_i standard normal

    For gradients that exist but change at every step (k-winners-take-all, noise, quantised activations), and for flat places
    with slopes nearby. Useless where the gradient is zero everywhere (rounding): take ``FiniteDifference`` or ``Through``.

    Args:
        model: the classifier.
        sigma: standard deviation of the noise, in units of the input; about the radius.
        draws: points the gradient is averaged over.

    Cost: one forward a look; ``2 * draws`` passes a pull.

    **Source**: D. Smilkov et al., "SmoothGrad", 2017, as an attack: M. Pintor et al., "Indicators of attack failure", NeurIPS
    2022, section 4 (averaged gradients against k-winners-take-all).
    **Differs from the paper**: Gaussian instead of uniform noise.
    """

    def __init__(self, model: nn.Module, sigma: float, draws: int = 16) -> None:
        super().__init__(model, sigma, draws)
        self.backwards = 2 * draws

    def _estimate(self, x: Tensor, cotangent: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for draw in range(self.draws):
            point = (x + self.sigma * self._noise(x, draw)).detach().requires_grad_(True)
            with torch.enable_grad():
                logits = classify(self.model, point)
            total += torch.autograd.grad(logits, point, cotangent)[0]
        return total.div_(self.draws)


class FiniteDifference(_Around):
    """The gradient from differences of answers along random directions, in opposite pairs; no backward pass at all.

        g = mean_i of <c, f(x + sigma u_i) - f(x - sigma u_i)> / (2 sigma) u_i

    For models without gradients, or whose gradients lie. Its error falls with the root of ``draws`` over the number of inputs, so
    it is costly; where a layer can be named, ``Through`` is far cheaper.

    Args:
        model: the classifier; it need not be differentiable.
        sigma: how far to look, in units of the input: larger than the steps of a staircase, smaller than the radius.
        draws: pairs of looks per gradient.

    Cost: one forward a look; ``2 * draws`` passes a pull.

    >>> net = nn.Linear(3, 2, bias=False)
    >>> x = torch.zeros(1, 3, requires_grad=True)
    >>> (g,) = torch.autograd.grad(FiniteDifference(net, 0.1, draws=4000)(x)[:, 0].sum(), x)
    >>> bool((g - net.weight[:1]).abs().max() < 0.15)
    True

    **Differs from the paper**: the estimate is pulled through the logits, so that any objective can be followed with it.
    **Source**: A. Ilyas, L. Engstrom, A. Athalye, J. Lin, "Black-box adversarial attacks with limited queries and
    information", ICML 2018, section 2.1 (NES, antithetic); J. Uesato et al., ICML 2018 (SPSA, the same with signs).
    """

    needs: ClassVar[Access] = Access.LOGIT

    def __init__(self, model: nn.Module, sigma: float, draws: int = 32) -> None:
        super().__init__(model, sigma, draws)
        self.backwards = 2 * draws

    def _estimate(self, x: Tensor, cotangent: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        with torch.no_grad():
            for draw in range(self.draws):
                u = self._noise(x, draw)
                rise = classify(self.model, x + self.sigma * u) - classify(self.model, x - self.sigma * u)
                slope = (rise * cotangent).sum(1) / (2 * self.sigma)
                total += u * slope.view(-1, *[1] * (x.dim() - 1))
        return total.div_(self.draws)


def reparameterize(model: nn.Module, decode: Callable[[Tensor], Tensor]) -> nn.Module:
    """The classifier as a function of the latent z, where inputs are x = decode(z).

    An attack on it moves z and stays on what ``decode`` can make: the range of a generator, a warp, a projection. A defense
    that projects onto that range has nothing to take away there.

    Args:
        model: the classifier of x.
        decode: differentiable, [B, ...] to inputs [B, ...]; of a function records hold the name alone, of a module its weights.

    >>> net = nn.Linear(2, 2).eval()
    >>> latent = reparameterize(net, torch.tanh)
    >>> latent(torch.zeros(1, 2)).shape
    torch.Size([1, 2])

    **Differs from the paper**: nothing.
    **Source**: A. Athalye, N. Carlini, D. Wagner, "Obfuscated gradients give a false sense of security", ICML 2018,
    section 4.3.
    """
    return _Reparameterized(model, decode)


class _Reparameterized(nn.Module):
    def __init__(self, model: nn.Module, decode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.decode = model, decode
        self.training = model.training

    def forward(self, z: Tensor) -> Tensor:
        return self.model(self.decode(z))

    def extra_repr(self) -> str:
        """What a record names; a module is listed, with its weights, among the parts."""
        if isinstance(self.decode, nn.Module):
            return ""
        named = self.decode if hasattr(self.decode, "__qualname__") else type(self.decode)
        return f"decode={named.__module__}.{named.__qualname__}"

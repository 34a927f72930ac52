"""Stand-ins that are fitted to a layer's own inputs and outputs, for layers that the identity does not resemble."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, mse_loss

from mohs import streams
from mohs.errors import ModelError, UsageError

KINDS = ("pointwise", "local", "linear", "hidden")
"""Kinds of stand-ins, the simplest first; the first two are for images."""
RATE, EPOCHS, STEPS, BATCH = 1e-2, 5, 120, 16
"""Adam's rate; epochs over the sample, and more of them where these are fewer steps than so many; rows of a step."""
WIDTH = 32
"""Channels, or units, between the two layers."""
LARGEST = 1 << 22
"""Weights that a linear stand-in may have."""


class Fitted(nn.Module):
    """A small differentiable net in the place of a layer, for its backward pass; made by ``fit``.

    Args:
        kind: one of ``KINDS``.
        net: between scaled inputs and scaled outputs.
        size: height and width of the outputs, None for rows of numbers.
        shape: of one output.
        center, scale: mean and standard deviation of inputs and of outputs.
        error: the share of the outputs' variance that is not explained.
    """

    def __init__(
        self, kind: str, net: nn.Module, size: tuple[int, ...] | None, shape: tuple[int, ...],
        center: tuple[float, float], scale: tuple[float, float],
    ) -> None:  # fmt: skip
        super().__init__()
        self.kind, self.net, self.size, self.shape = kind, net, size, shape
        self.center, self.scale, self.error = center, scale, math.nan

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] to the shape of the layer's outputs."""
        x = (x - self.center[0]) / self.scale[0]
        if self.size is None:
            x = x.flatten(1)
        elif x.shape[2:] != self.size:
            x = interpolate(x, self.size, mode="bilinear", align_corners=False)
        return (self.net(x) * self.scale[1] + self.center[1]).view(len(x), *self.shape)

    def __repr__(self) -> str:
        return f"Fitted({self.kind}, {self.error:.0%} unexplained)"


def kinds(came: Tensor, went: Tensor) -> tuple[str, ...]:
    """The kinds of stand-ins that fit inputs ``came`` [B, ...] and outputs ``went`` [B, ...].

    >>> kinds(torch.zeros(1, 3, 8, 8), torch.zeros(1, 6, 4, 4)), kinds(torch.zeros(1, 5), torch.zeros(1, 7))
    (('pointwise', 'local', 'linear'), ('linear', 'hidden'))
    """
    if not len(came) or len(came) != len(went) or not came.is_floating_point() or not went.is_floating_point():
        return ()
    small = came[0].numel() * went[0].numel() <= LARGEST
    if came.dim() == went.dim() == 4:
        return ("pointwise", "local", *(["linear"] if small else []))
    return ("linear", "hidden") if small else ("hidden",)


def fit(came: Tensor, went: Tensor, kind: str, seed: int = 0) -> Fitted:
    """Fit a stand-in to inputs and outputs of a layer, for ``BPDA``, ``Through`` or ``Past``.

    For a layer without a useful gradient whose outputs lie elsewhere than its inputs: other channels, another scale or place,
    pixels that move. Then the identity points the wrong way, or has not even the shape. It is as good as the sample: give
    inputs like those that will be attacked. It fails where the layer is no smooth function plus something small.

        min over w of mean |g_w(came) - went|^2,   g: 1x1 convolution; two 3x3 convolutions; linear; two linear layers

    Inputs and outputs are scaled to mean 0 and variance 1 first. The linear kind is the least-squares solution with a small
    penalty on its weights, the others are trained.

    Args:
        came: inputs of the layer [N, ...].
        went: its outputs [N, ...].
        kind: "pointwise" (a 1x1 convolution) or "local" (two 3x3 convolutions) where both are images; "linear" or "hidden" (a
            hidden layer) for rows of numbers; "linear" also for small images.
        seed: of the first weights and of the order of the sample, together with its content.

    Returns:
        The stand-in in eval mode; ``error`` is the share of the variance that it leaves.

    Raises:
        UsageError: an unknown kind.
        ModelError: the kind does not fit these shapes; nothing varies.

    Cost: none of the model; 5 epochs over the sample (at least 120 steps on 16 rows) of a small net, or one linear system.

    >>> x = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> stand_in = fit(x, (4 * x[:, :1]).round() / 4, "pointwise")
    >>> stand_in(x).shape, stand_in.error < 0.1
    (torch.Size([64, 1, 8, 8]), True)

    **Differs from the paper**: inputs and outputs are scaled; images are resized first where the layer does that; small samples
    are gone through more often; a linear kind, which also finds pixels that were moved far.
    **Source**: C. Yao, P. Bielik, P. Tsankov, M. Vechev, "Automated discovery of adaptive attacks on adversarial defenses",
    NeurIPS 2021, section 4.1 and its code (Adam at 1e-2, 5 epochs, mean square; the best by the success of an attack).
    """
    if kind not in KINDS:
        raise UsageError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}.")
    if kind not in kinds(came, went):
        raise ModelError(
            f"A stand-in of kind {kind!r} cannot map {tuple(came.shape)} to {tuple(went.shape)}. Allowed there: "
            f"{', '.join(kinds(came, went)) or 'none'}."
        )
    came, went = came.detach(), went.detach()
    rows = (came.flatten(1).isfinite().all(1) & went.flatten(1).isfinite().all(1)).nonzero().squeeze(1)
    came, went = came[rows], went[rows]
    spread = [float(t.std(correction=0)) if t.numel() else 0.0 for t in (came, went)]
    if not all(s > 0 for s in spread):
        raise ModelError("A stand-in cannot be fitted where inputs or outputs do not vary.")
    key = streams.derive(streams.content_keys(came), seed, streams.text_key(f"fit {kind}"))
    generator = torch.Generator().manual_seed(int(key.sum()) % (1 << 62))
    images = kind in ("pointwise", "local")
    make: dict[str, Callable[[], nn.Module]] = {
        "pointwise": lambda: nn.Conv2d(came.shape[1], went.shape[1], 1),
        "local": lambda: nn.Sequential(
            nn.Conv2d(came.shape[1], WIDTH, 3, padding=1), nn.ReLU(), nn.Conv2d(WIDTH, went.shape[1], 3, padding=1)
        ),
        "linear": lambda: nn.Linear(came[0].numel(), went[0].numel()),
        "hidden": lambda: nn.Sequential(
            nn.Linear(came[0].numel(), WIDTH), nn.ReLU(), nn.Linear(WIDTH, went[0].numel())
        ),
    }
    with torch.inference_mode(False), torch.enable_grad():
        with torch.random.fork_rng([]):  # a new layer draws weights of its own first
            net = make[kind]()
        found = Fitted(
            kind, _seeded(net, generator).to(came), tuple(went.shape[2:]) if images else None,
            tuple(went.shape[1:]), (float(came.mean()), float(went.mean())), (spread[0], spread[1]),
        )  # fmt: skip
        if kind == "linear":
            _solve(found, came, went)
        else:
            _train(found, came, went, generator)
    found.eval().requires_grad_(False)
    with torch.no_grad():
        found.error = float(mse_loss(found(came), went)) / spread[1] ** 2
    return found


def _seeded(net: nn.Module, generator: torch.Generator) -> nn.Module:
    """The usual first weights, from a generator of our own."""
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                bound = 1 / math.sqrt(layer.weight[0].numel())
                layer.weight.uniform_(-bound, bound, generator=generator)
                assert layer.bias is not None
                layer.bias.uniform_(-bound, bound, generator=generator)
    return net


def _train(found: Fitted, came: Tensor, went: Tensor, generator: torch.Generator) -> None:
    optimiser = torch.optim.Adam(found.net.parameters(), RATE)
    each = math.ceil(len(came) / BATCH)
    for _ in range(max(EPOCHS, math.ceil(STEPS / each))):
        for rows in torch.randperm(len(came), generator=generator).to(came.device).split(BATCH):
            loss = mse_loss(found(came[rows]), went[rows]) / found.scale[1] ** 2
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()


def _solve(found: Fitted, came: Tensor, went: Tensor) -> None:
    """The weights of least squares, with a penalty of a thousandth of the mean variance; in the space of the rows where these
    are fewer than the inputs."""
    a = ((came.flatten(1).double() - found.center[0]) / found.scale[0]).detach()
    b = ((went.flatten(1).double() - found.center[1]) / found.scale[1]).detach()
    middle, aim = a.mean(0), b.mean(0)
    a, b = a - middle, b - aim
    penalty = 1e-3 * float(a.square().sum()) / min(a.shape)
    if len(a) < a.shape[1]:
        gram = a @ a.T + penalty * torch.eye(len(a), dtype=a.dtype, device=a.device)
        weight = a.T @ torch.linalg.solve(gram, b)
    else:
        gram = a.T @ a + penalty * torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
        weight = torch.linalg.solve(gram, a.T @ b)
    net = found.net
    assert isinstance(net, nn.Linear)
    assert net.bias is not None
    with torch.no_grad():
        net.weight.copy_(weight.T)
        net.bias.copy_(aim - middle @ weight)

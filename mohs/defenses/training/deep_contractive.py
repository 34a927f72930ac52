"""Deep contractive networks: the clean loss, and how much each layer stretches what comes in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mohs import streams
from mohs.defenses._settings import number
from mohs.defenses.training.objective import Context
from mohs.defenses.training.room import keys
from mohs.errors import ModelError
from mohs.target import classify


@dataclass(frozen=True)
class DeepContractive:
    """Cross-entropy on the inputs as they are, plus the squared Jacobians of all layers.

        loss = J(x, y) + penalty * sum_j ||d h_j / d h_(j-1)||_F^2            h_0 = x, h_1, ... , the logits

    Where all layers contract what comes in, the answers move little. It is a sum and no product, taken at the training data: nothing is
    promised elsewhere. Judge such nets by strong attacks, since saturated layers have small Jacobians and hide gradients.

    With n outputs of a layer, the square is n / k times the sum of ||u J||^2 over k random orthonormal directions u: right on average,
    and exact from k = n on. A layer here is a child of the ``nn.Sequential`` that has a weight matrix or filters, and all that follows
    up to the next such child: normalisation, activation, pooling. What comes before the first belongs to the first; a child that is a
    block of several layers counts as one.

    Args:
        penalty: weight of the squares, >= 0; 0 is natural training, and then no Jacobian is looked at. They are sums over all outputs
            of a layer, so begin small for convolutions.
        projections: directions per layer and row, >= 1; None: all, the exact norm, for small layers.

    Raises:
        ModelError: the net is no ``nn.Sequential``, or has no layer with weights.

    Cost: 1 forward and 1 backward, and for each projection about 2 more backwards, per example and epoch.

    >>> net = nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    >>> for layer, weight in ((net[0], [[1.0, 2.0, 0.0], [-1.0, 0.0, 0.0]]), (net[2], [[2.0, 0.0], [0.0, 0.0]])):
    ...     _ = layer.weight.data.copy_(torch.tensor(weight))
    >>> exact = DeepContractive(projections=None).squares(net, torch.ones(1, 3), seed=0)[1]
    >>> [round(s.item(), 4) for s in exact]  # 1 + 4 of the unit that is active, and 4
    [5.0, 4.0]

    **Differs from the paper**: the squared Frobenius norm, as in the contractive autoencoder, where the paper writes an unsquared
    norm; random directions instead of closed forms; one weight for all layers; the whole gradient, where the paper goes layer by
    layer. With batch statistics a row's outputs depend on other rows, and the norm is that of the whole batch, right on average only.
    **Source**: S. Gu, L. Rigazio, "Towards deep neural network architectures robust to adversarial examples", ICLR 2015 workshop, the
    section on deep contractive networks; S. Rifai et al., "Contractive auto-encoders", ICML 2011; directions: J. Hoffman, D. Roberts,
    S. Yaida, "Robust learning with Jacobian regularization", 2019.
    """

    penalty: float = 1e-3
    projections: int | None = 1
    attack: ClassVar[None] = None

    def __post_init__(self) -> None:
        number(self.penalty, "penalty of DeepContractive, the weight of squared Jacobians,", 0)
        if self.projections is not None:
            number(self.projections, "projections of DeepContractive", 1, whole=True)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """J(x, y) + penalty * the sum of the squares, means over the batch; a term of weight zero is not computed."""
        if self.penalty == 0:
            return F.cross_entropy(classify(model, x), y)
        logits, squares = self.squares(model, x, context.seed)
        return F.cross_entropy(logits, y) + self.penalty * torch.stack(squares).sum()

    def squares(self, model: nn.Module, x: Tensor, seed: int) -> tuple[Tensor, list[Tensor]]:
        """Logits, and for each layer the mean over the batch of the squared Frobenius norm of its Jacobian, differentiable.

        Args:
            model: an ``nn.Sequential``.
            x: inputs [B, ...].
            seed: of the directions.
        """
        with torch.enable_grad(), _passing(model) as passed:
            logits = classify(model, x.detach().requires_grad_(True))
        pairs = itertools.pairwise(passed)
        return logits, [self._square(*pair, keys(x, seed, layer)) for layer, pair in enumerate(pairs)]

    def _square(self, came: Tensor, went: Tensor, key: Tensor) -> Tensor:
        total = came.new_zeros(())
        for direction in _directions(went, self.projections, key):
            (g,) = torch.autograd.grad(went, came, direction, create_graph=True)
            total = total + g.square().sum()
        return total / len(came)


def _directions(like: Tensor, count: int | None, key: Tensor) -> Iterator[Tensor]:
    """Random directions [B, ...] whose squared products with a vector sum up, on average or exactly, to its squared length."""
    n = like[0].numel()
    if count is None or count >= n:
        # random signs, so that rows which share batch statistics do not add up
        signs = streams.normal(key, (n,), dtype=like.dtype).sign()
        for k in range(n):
            yield (torch.zeros_like(signs).index_fill_(1, torch.tensor([k], device=key.device), 1.0) * signs).view_as(
                like
            )
        return
    q, r = torch.linalg.qr(streams.normal(key, (n, count), dtype=like.dtype))
    # the decomposition fixes the sign of an entry of q; without it a direction and its opposite are as likely
    frames = q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1) * math.sqrt(n / count)
    for k in range(count):
        yield frames[:, :, k].reshape(like.shape)


@contextmanager
def _passing(model: nn.Module) -> Iterator[list[Tensor]]:
    """What comes to each layer and what leaves the last, once the model was called inside."""
    if not isinstance(model, nn.Sequential):
        raise ModelError(
            f"DeepContractive looks at the layers of an nn.Sequential, one after the other; got {type(model).__name__}. Allowed: a "
            "chain of layers or blocks. Write the net as one, or penalise it with another objective, such as VAT()."
        )
    begins = [child for child in model if any(p.dim() > 1 for p in child.parameters())]
    if not begins:
        raise ModelError("DeepContractive needs a layer with a weight matrix or filters, and this model has none.")
    passed: list[Tensor] = []

    def came(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        passed.append(inputs[0])

    def went(_: nn.Module, __: Any, output: Tensor) -> None:
        passed.append(output)

    layers = dict.fromkeys([model[0], *begins[1:]])  # a layer that is used twice is looked at twice
    handles = [layer.register_forward_pre_hook(came) for layer in layers]
    handles.append(model.register_forward_hook(went))
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()

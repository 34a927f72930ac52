"""The layers a bound can pass, each with its action on points, magnitudes and linear functions, and its rounding.

A certificate must hold for the net as it is executed, in floating point, not only for the real function its weights
describe. So every affine layer z = W a + b is read as z = W a + b + d, where d is whatever rounding does there:
|d| <= ``rounding(M)`` for all executed inputs |a| <= M. For dot products summed in any order that is
gamma_n (|W| M + |b|) with gamma_n = n u / (1 - n u) and u the unit roundoff of the executed dtype. The same term, with
the unit roundoff of the bounds' own dtype added, pays for the rounding of the bounds themselves (an adjoint A W
is wrong by at most gamma_m |A| |W|, which acts on a by at most gamma_m |A| (|W| M)). ReLU and reshapes are exact.

**Source**: N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, section 3.1 (gamma_n).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]


def gamma(n: int, u: float) -> float:
    """Relative error of n roundings, n u / (1 - n u); infinite where the formula ends.

    >>> gamma(2, 0.25), gamma(4, 0.25)
    (1.0, inf)
    """
    return n * u / (1 - n * u) if n * u < 1 else math.inf


@dataclass(frozen=True)
class Arithmetic:
    """The floating-point types of the executed net (``run``) and of the bounds (``bound``)."""

    run: torch.dtype
    bound: torch.dtype

    @property
    def u_run(self) -> float:
        """Unit roundoff of the executed net."""
        return torch.finfo(self.run).eps / 2

    @property
    def u_bound(self) -> float:
        """Unit roundoff of the bounds."""
        return torch.finfo(self.bound).eps / 2


def safe_norm(v: Tensor, q: float) -> Tensor:
    """q-norm over all dimensions but the first, without underflow of powers."""
    flat = v.flatten(1)
    scale = flat.abs().amax(1).clamp_min(torch.finfo(v.dtype).tiny)
    return scale * torch.linalg.vector_norm(flat / scale.unsqueeze(1), q, dim=1)


class Reshape:
    """Any rearrangement of the numbers of one example."""

    def __init__(self, in_shape: Shape, out_shape: Shape) -> None:
        self.in_shape, self.out_shape = in_shape, out_shape


class ReLU:
    """max(z, 0), coordinate by coordinate."""

    def __init__(self, shape: Shape) -> None:
        self.in_shape = self.out_shape = shape


class Affine(ABC):
    """z = W a + b on examples of ``in_shape``; subclasses say what W is.

    Args:
        in_shape: one example before the layer.
        out_shape: one example after it.
        fan_in: roundings behind one output, at most (terms summed, plus those of computing the coefficients).
        fan_out: terms summed by the adjoint for one input, at most.
        largest: largest magnitude of a coefficient, for what underflow can lose.
    """

    mixes = True  # does an output depend on several inputs?

    def __init__(self, in_shape: Shape, out_shape: Shape, fan_in: int, fan_out: int, largest: float) -> None:
        self.in_shape, self.out_shape = in_shape, out_shape
        self.fan_in, self.fan_out, self.largest = fan_in, fan_out, largest

    @abstractmethod
    def linear(self, v: Tensor) -> Tensor:
        """W v, without the offset."""

    @abstractmethod
    def magnitude(self, v: Tensor) -> Tensor:
        """|W| v for v >= 0, without the offset."""

    @abstractmethod
    def adjoint(self, a: Tensor) -> Tensor:
        """a W for linear functions a [P, *out_shape] of the outputs: [P, *in_shape]."""

    def rows(self, outputs: Tensor, like: Tensor) -> Tensor:
        """Rows of W [P, *in_shape] for ``outputs`` [P], flat indices of single outputs; ``like`` for the dtype."""
        single = like.new_zeros(len(outputs), math.prod(self.out_shape))
        single[torch.arange(len(outputs), device=outputs.device), outputs] = 1.0
        return self.adjoint(single.view(-1, *self.out_shape))

    @abstractmethod
    def offset(self) -> Tensor | None:
        """b, broadcastable to ``out_shape``."""

    def offset_magnitude(self) -> Tensor | None:
        """Sum of the magnitudes that b was computed from; |b| when it is stored as such."""
        offset = self.offset()
        return None if offset is None else offset.abs()

    def row_norm(self, q: float, scale: Tensor) -> Tensor | None:
        """q-norms of the rows of W diag(scale), broadcastable to ``out_shape``; None where not implemented."""
        return None

    def apply(self, v: Tensor) -> Tensor:
        """W v + b."""
        offset = self.offset()
        return self.linear(v) if offset is None else self.linear(v) + offset

    def rounding(self, size: Tensor, arithmetic: Arithmetic) -> Tensor:
        """Bound on the rounding of one pass over inputs of magnitude at most ``size``; inf where it may overflow."""
        total = self.magnitude(size)
        offset = self.offset_magnitude()
        if offset is not None:
            total = total + offset
        bounds = 4 * gamma(self.fan_in + self.fan_out + 16, arithmetic.u_bound)
        relative = 1.01 * (gamma(self.fan_in + 2, arithmetic.u_run) + bounds)
        run = torch.finfo(arithmetic.run)
        lost = (self.fan_in + 2) * run.tiny * (1 + self.largest)  # products and inputs below the normal range
        rounding = total * relative + lost
        return rounding.masked_fill(~(total * (1 + relative) < run.max / 4), math.inf)


class Linear(Affine):
    """A matrix on the last dimension."""

    def __init__(self, in_shape: Shape, weight: Tensor, bias: Tensor | None) -> None:
        out, inputs = weight.shape
        largest = float(weight.abs().max()) if weight.numel() else 0.0
        super().__init__(in_shape, (*in_shape[:-1], out), inputs + 1, out, largest)
        self.weight, self.bias, self.absolute = weight, bias, weight.abs()

    def linear(self, v: Tensor) -> Tensor:
        """W v."""
        return F.linear(v, self.weight)

    def magnitude(self, v: Tensor) -> Tensor:
        """|W| v."""
        return F.linear(v, self.absolute)

    def adjoint(self, a: Tensor) -> Tensor:
        """a W."""
        return a @ self.weight

    def rows(self, outputs: Tensor, like: Tensor) -> Tensor:
        """Rows of the matrix."""
        return self.weight[outputs] if len(self.in_shape) == 1 else super().rows(outputs, like)

    def offset(self) -> Tensor | None:
        """The bias."""
        return self.bias

    def row_norm(self, q: float, scale: Tensor) -> Tensor | None:
        """Exact for flat inputs."""
        return safe_norm(self.weight * scale, q) if scale.dim() == 1 else None


class Conv2d(Affine):
    """A two-dimensional convolution with zero padding."""

    def __init__(
        self,
        in_shape: Shape,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> None:
        self.weight, self.absolute, self.groups = weight, weight.abs(), groups
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.bias = None if bias is None else bias.view(-1, 1, 1)
        height, width = (
            (in_shape[1 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
            for i in (0, 1)
        )
        taps = weight.shape[2] * weight.shape[3]
        super().__init__(
            in_shape,
            (weight.shape[0], height, width),
            weight.shape[1] * taps + 1,
            weight.shape[0] // groups * taps,
            float(self.absolute.max()),
        )
        # rows and columns at the far edge that no window reaches
        self.unseen = tuple(
            in_shape[1 + i]
            - ((self.out_shape[1 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight.shape[2 + i] - 1) + 1)
            for i in (0, 1)
        )

    def rows(self, outputs: Tensor, like: Tensor) -> Tensor:
        """Copies of the filters, each where its window lies."""
        _, height, width = self.out_shape
        channel, place = outputs // (height * width), outputs % (height * width)
        filters = self.weight[channel]
        index = [torch.arange(size, device=outputs.device) for size in filters.shape]
        first = channel // (self.out_shape[0] // self.groups) * self.weight.shape[1]  # of its group
        corner = (place // width * self.stride[0], place % width * self.stride[1])
        above, left = self.padding
        padded = like.new_zeros(
            len(outputs), self.in_shape[0], self.in_shape[1] + 2 * above, self.in_shape[2] + 2 * left
        )
        padded[
            index[0][:, None, None, None],
            (first[:, None] + index[1])[:, :, None, None],
            (corner[0][:, None] + index[2] * self.dilation[0])[:, None, :, None],
            (corner[1][:, None] + index[3] * self.dilation[1])[:, None, None, :],
        ] = filters
        return padded[:, :, above : above + self.in_shape[1], left : left + self.in_shape[2]]

    def _convolve(self, v: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(v, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def linear(self, v: Tensor) -> Tensor:
        """W v."""
        return self._convolve(v, self.weight)

    def magnitude(self, v: Tensor) -> Tensor:
        """|W| v."""
        return self._convolve(v, self.absolute)

    def adjoint(self, a: Tensor) -> Tensor:
        """The transposed convolution."""
        return F.conv_transpose2d(
            a, self.weight, None, self.stride, self.padding, self.unseen, self.groups, self.dilation
        )

    def offset(self) -> Tensor | None:
        """The bias."""
        return self.bias

    def row_norm(self, q: float, scale: Tensor) -> Tensor | None:
        """The norm of the whole filter: exact inside, an upper bound where the window meets the padding."""
        channels = scale.flatten(1).amax(1).view(self.groups, -1)
        per_output = channels.repeat_interleave(self.weight.shape[0] // self.groups, 0)
        return safe_norm(self.weight * per_output[:, :, None, None], q).view(-1, 1, 1)


class Pool(Affine):
    """An average over windows, given as a function without offset; its coefficients lie in [0, 1]."""

    def __init__(self, in_shape: Shape, pool: Callable[[Tensor], Tensor], window: int, like: Tensor) -> None:
        self.pool = pool
        out_shape = tuple(pool(like.new_zeros(1, *in_shape)).shape[1:])
        super().__init__(in_shape, out_shape, window + 1, window, 1.0)

    def linear(self, v: Tensor) -> Tensor:
        """The averages."""
        return self.pool(v)

    def magnitude(self, v: Tensor) -> Tensor:
        """The averages."""
        return self.pool(v)

    def adjoint(self, a: Tensor) -> Tensor:
        """The averages' gradient."""
        pull = torch.func.vjp(self.pool, a.new_zeros(len(a), *self.in_shape))[1]
        return pull(a)[0]

    def offset(self) -> Tensor | None:
        """None."""
        return None


class Scale(Affine):
    """(a - mean) * factor + bias, coordinate by coordinate: a normalisation, or a batch norm with frozen statistics."""

    mixes = False

    def __init__(self, shape: Shape, mean: Tensor, factor: Tensor, bias: Tensor | None) -> None:
        # twelve roundings: 1 / sqrt(var + eps), its product with the weight, the shift, and the final two operations
        largest = float(factor.abs().max()) * (1 + float(mean.abs().max()))
        super().__init__(shape, shape, 12, 1, largest)
        self.factor, self.bias = factor, bias
        self.shift = -mean * factor if bias is None else bias - mean * factor
        self.parts = (mean * factor).abs() if bias is None else (mean * factor).abs() + bias.abs()

    def linear(self, v: Tensor) -> Tensor:
        """Factor times v."""
        return v * self.factor

    def magnitude(self, v: Tensor) -> Tensor:
        """|factor| times v."""
        return v * self.factor.abs()

    def adjoint(self, a: Tensor) -> Tensor:
        """A diagonal is its own adjoint."""
        return a * self.factor

    def offset(self) -> Tensor | None:
        """Bias - mean * factor."""
        return self.shift

    def offset_magnitude(self) -> Tensor | None:
        """|mean * factor| + |bias|: the offset may cancel, its rounding does not."""
        return self.parts


Layer = Affine | ReLU | Reshape

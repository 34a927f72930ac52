"""Reads a module into the chain of layers that the bounds pass, or says which layer it cannot read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mohs.certificates._layers import Affine, Arithmetic, Conv2d, Layer, Linear, Pool, ReLU, Reshape, Scale, Shape
from mohs.errors import ModelError

SUPPORTED = (
    "Linear, Conv2d (zero padding), ReLU, Flatten, AvgPool2d, AdaptiveAvgPool2d, BatchNorm1d and BatchNorm2d in eval "
    "mode, Dropout in eval mode, Identity, a normalisation with `mean` and `std`, and nn.Sequential of these"
)


@dataclass(frozen=True)
class Net:
    """A feed-forward chain of layers.

    Args:
        layers: in order of execution.
        in_shape: one input.
        classes: logits; 1 means one logit, class 1 when it is positive.
        arithmetic: how it is executed and how it is bounded.
    """

    layers: tuple[Layer, ...]
    in_shape: Shape
    classes: int
    arithmetic: Arithmetic

    @property
    def widest(self) -> int:
        """Numbers of the largest layer, inputs included."""
        return max([math.prod(self.in_shape), *(math.prod(layer.out_shape) for layer in self.layers)])

    @property
    def after_relu(self) -> int:
        """Index of the first layer behind the last ReLU; 0 for an affine net."""
        return max((i + 1 for i, layer in enumerate(self.layers) if isinstance(layer, ReLU)), default=0)

    def mixed(self, stop: int) -> int:
        """How many mixing affine layers stand before layer ``stop``: an interval is exact up to the first."""
        return sum(isinstance(layer, Affine) and layer.mixes for layer in self.layers[:stop])


def read_net(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Net:
    """Read a module into a chain of layers whose coefficients have ``dtype``.

    Args:
        model: nested ``nn.Sequential`` of the supported layers.
        x: [N, ...] inputs, for the shape and the executed dtype.
        dtype: the bounds' own dtype.

    Raises:
        ModelError: a layer is not supported, is in train mode, or does not fit what comes before it.
    """
    dtypes = {x.dtype, *(p.dtype for p in model.parameters() if p.dtype.is_floating_point)}
    run = max(dtypes, key=lambda d: torch.finfo(d).eps)
    layers: list[Layer] = []
    shape = tuple(x.shape[1:])
    with torch.no_grad():
        for path, module in _unroll(model, ""):
            layer = _read_layer(path, module, shape, x.new_zeros((), dtype=dtype))
            if layer is not None:
                layers.append(layer)
                shape = layer.out_shape
    if len(shape) > 1 or (len(shape) == 1 and shape[0] == 0):
        raise ModelError(
            f"A certificate needs logits [N, K] or one logit [N]; the net ends with examples of shape {shape}. "
            "Add a Flatten and a Linear layer."
        )
    return Net(tuple(layers), tuple(x.shape[1:]), shape[0] if shape else 1, Arithmetic(run, dtype))


def _is(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Is it one of these, forward included? A subclass that computes something else is not."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def _unroll(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise ModelError(
            f"A certificate reads the layers of the net; {_named(path, module)} has a forward hook or a replaced "
            "forward, which may change what it computes. Remove it first."
        )
    if _is(module, nn.Sequential):
        for name, child in module.named_children():
            yield from _unroll(child, f"{path}.{name}" if path else name)
        return
    yield path, module
    if _is_normalisation(module):
        for name, child in module.named_children():
            yield from _unroll(child, f"{path}.{name}" if path else name)


def _is_normalisation(module: nn.Module) -> bool:
    """(x - mean) / std, alone or in front of its only child; that it computes this is checked on real inputs later."""
    found = all(isinstance(getattr(module, name, None), Tensor) for name in ("mean", "std"))
    return found and len(list(module.children())) <= 1


def _named(path: str, module: nn.Module) -> str:
    return f"layer {path!r} ({type(module).__name__})" if path else f"the model ({type(module).__name__})"


def _read_layer(path: str, module: nn.Module, shape: Shape, like: Tensor) -> Layer | None:
    """One layer, or None for one that does nothing; ``like`` carries dtype and device of the coefficients."""
    _refuse_train_mode(path, module)
    if _is(module, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d):
        return None
    try:
        layer = _build(module, shape, like)
    except (RuntimeError, IndexError, ValueError) as error:
        raise ModelError(f"{_named(path, module)} does not fit examples of shape {shape}: {error}") from error
    if layer is None:
        raise ModelError(
            f"A certificate cannot read {_named(path, module)}. Supported: {SUPPORTED}. "
            "Rewrite the net with these, or leave it to the attacks."
        )
    return layer


def _refuse_train_mode(path: str, module: nn.Module) -> None:
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.BatchNorm1d, nn.BatchNorm2d)
    frozen = not module.training and getattr(module, "running_mean", True) is not None
    if isinstance(module, kinds) and not frozen:
        raise ModelError(
            f"A certificate needs a deterministic net; {_named(path, module)} is in train mode or has no running "
            "statistics, so its output depends on the batch or on chance. Call model.eval() first."
        )


def _build(module: nn.Module, shape: Shape, like: Tensor) -> Layer | None:
    def cast(values: Tensor) -> Tensor:
        return values.detach().to(like)

    if _is_normalisation(module):
        mean, std = (_per_channel(cast(getattr(module, name)), shape) for name in ("mean", "std"))
        return Scale(shape, mean, 1 / std, None)
    if _is(module, nn.ReLU):
        return ReLU(shape)
    if isinstance(module, nn.Flatten) and _is(module, nn.Flatten):
        return _flatten(module, shape)
    if isinstance(module, nn.Linear) and _is(module, nn.Linear):
        if not shape or shape[-1] != module.in_features:
            raise ValueError(f"it takes {module.in_features} features")
        return Linear(shape, cast(module.weight), None if module.bias is None else cast(module.bias))
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and _is(module, nn.BatchNorm1d, nn.BatchNorm2d):
        return _batch_norm(module, shape, like)
    if len(shape) != 3:
        return None
    if isinstance(module, nn.Conv2d) and _is(module, nn.Conv2d):
        return _conv(module, shape, like)
    if isinstance(module, nn.AvgPool2d) and _is(module, nn.AvgPool2d):
        kernel = module.kernel_size
        window = math.prod(kernel) if isinstance(kernel, tuple) else int(kernel) ** 2
        if module.divisor_override is not None and module.divisor_override < 1:
            raise ValueError("a divisor below 1 is not supported")
        return Pool(shape, module.forward, window, like)
    if isinstance(module, nn.AdaptiveAvgPool2d) and _is(module, nn.AdaptiveAvgPool2d):
        return Pool(shape, module.forward, shape[1] * shape[2], like)
    return None


def _flatten(module: nn.Flatten, shape: Shape) -> Layer | None:
    if module.start_dim == 0:  # [N, 1] -> [N] for a single logit; otherwise it would join examples
        return Reshape(shape, (1,)) if math.prod(shape) == 1 and module.end_dim in (-1, len(shape)) else None
    example = torch.empty(2, *shape, device="meta")
    return Reshape(shape, tuple(module.forward(example).shape[1:]))


def _per_channel(values: Tensor, shape: Shape) -> Tensor:
    """Broadcast [C], [C, 1, 1], [1, C, 1, 1] or a number over examples of ``shape``."""
    if values.dim() == len(shape) + 1 and values.shape[0] == 1:
        values = values[0]
    if values.dim() == 1 and values.numel() > 1 and len(shape) > 1:
        values = values.view(-1, *[1] * (len(shape) - 1))
    return values.expand(shape)


def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d, shape: Shape, like: Tensor) -> Layer | None:
    if module.running_mean is None or module.running_var is None or shape[0] != module.num_features:
        raise ValueError(f"it takes {module.num_features} channels and running statistics")
    mean, var = module.running_mean.to(like), module.running_var.to(like)
    factor = (var + module.eps).rsqrt()
    bias = torch.zeros_like(factor)
    if module.affine:
        factor, bias = factor * module.weight.detach().to(like), module.bias.detach().to(like)
    tall = (-1, *[1] * (len(shape) - 1))
    mean, factor, bias = (v.view(tall).expand(shape) for v in (mean, factor, bias))
    return Scale(shape, mean, factor, bias)


def _conv(module: nn.Conv2d, shape: Shape, like: Tensor) -> Layer | None:
    if module.padding_mode != "zeros" or shape[0] != module.in_channels:
        raise ValueError(f"it takes {module.in_channels} channels, and only zero padding is supported")
    before = module._reversed_padding_repeated_twice
    if before[0] != before[1] or before[2] != before[3]:
        raise ValueError("padding='same' that differs between the two sides is not supported")
    bias = None if module.bias is None else module.bias.detach().to(like)
    padding = (before[2], before[0])
    stride, dilation = (module.stride[0], module.stride[1]), (module.dilation[0], module.dilation[1])
    weight = module.weight.detach().to(like)
    return Conv2d(shape, weight, bias, stride, padding, dilation, module.groups)

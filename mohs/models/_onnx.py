"""ONNX nets: checked, converted by onnx2pytorch, and believed only where onnxruntime gives the same answers."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mohs.errors import ModelError
from mohs.models._pt2 import _short

MAX_BYTES = 2 << 30  # protobuf's own limit
TOLERANCE = 1e-4  # of the largest logit
_INSTALL = "python -m pip install onnx onnxruntime && python -m pip install --no-deps onnx2pytorch==0.6.0"


class OnnxModel(nn.Module):
    """A converted ONNX net; gives the input the shape that the net declares and answers [N, K] logits."""

    def __init__(self, net: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.net = net
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        if x[:1].numel() != np.prod(self.shape) * len(x[:1]):
            raise ModelError(
                f"the ONNX net takes {int(np.prod(self.shape))} numbers per input ([N, "
                f"{', '.join(map(str, self.shape))}]), got a batch of shape {list(x.shape)}."
            )
        logits = self.net(x.reshape(len(x), *self.shape))
        return logits.flatten(1) if logits.dim() > 2 else logits


def load_onnx(path: Path) -> tuple[nn.Module, list[str]]:
    """The net in an ONNX file as a module with gradients, and notes; ModelError where that cannot be trusted."""
    onnx, runtime, converter = _extras()
    if path.stat().st_size > MAX_BYTES:
        raise ModelError(
            f"{path}: {path.stat().st_size:,} bytes, more than the {MAX_BYTES:,} that ONNX files may have."
        )
    model = _read(onnx, path)
    name, batch, shape = _input(model, path)
    try:
        session = runtime.InferenceSession(model.SerializeToString(), _quiet(runtime), ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own kinds
        raise ModelError(f"{path}: onnxruntime refuses the net ({_short(error)}).") from error
    net = OnnxModel(_convert(converter, model, path), shape).eval()
    net.requires_grad_(False)
    x = _probes(shape, batch or 1)
    expected = _reference(session, name, x, batch, path)
    fixed = "" if batch is None else f" It was exported for batches of {batch}; export it with a free batch axis."
    _compare(net, x, expected, path, fixed)
    notes = [f"converted from ONNX; logits agree with onnxruntime within {TOLERANCE:g} of the largest"]
    if batch is not None:
        notes.append(f"the file declares batches of {batch}; larger ones give the same answers")
    return net, notes


def _extras() -> tuple[Any, Any, Any]:
    try:
        onnx, runtime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
        importlib.import_module("onnx.checker")
        with warnings.catch_warnings(), _torchvision_or_stand_in():
            warnings.simplefilter("ignore")
            converter = importlib.import_module("onnx2pytorch")
    except ImportError as error:
        raise ModelError(f"ONNX files need extra packages ({error}). Install them with: {_INSTALL}") from error
    return onnx, runtime, converter


@contextlib.contextmanager
def _torchvision_or_stand_in() -> Iterator[None]:
    """Let onnx2pytorch be imported where torchvision is absent or broken.

    It imports a few functions for detection layers (boxes, regions, deformed convolutions) when it is loaded; no
    classifier uses them. Where the real ones cannot be had, stand-ins that raise on use take their place during the
    import, and sys.modules is left as it was found.
    """
    wanted = {"torchvision": (), "torchvision.io": ("decode_image", "ImageReadMode")}
    wanted["torchvision.ops"] = ("deform_conv2d", "roi_pool", "roi_align")
    before = {k: v for k, v in sys.modules.items() if k.split(".")[0] == "torchvision"}
    try:
        for module in wanted:
            importlib.import_module(module)
    except Exception:  # a torchvision built for another torch fails with RuntimeError
        pass
    else:
        yield
        return

    def absent(*_: Any, **__: Any) -> Any:
        raise ModelError("this ONNX net uses a layer for detection that needs torchvision; classifiers do not.")

    stand_ins = {module: types.ModuleType(module) for module in wanted}
    for module, names in wanted.items():
        for name in names:
            setattr(stand_ins[module], name, absent)
    for child in ("io", "ops"):
        setattr(stand_ins["torchvision"], child, stand_ins[f"torchvision.{child}"])
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for module in [k for k in sys.modules if k.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        sys.modules.update(before)


def _read(onnx: Any, path: Path) -> Any:
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise ModelError(f"{path}: not an ONNX file ({_short(error)}).") from error
    for tensor in _tensors(model, onnx):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_location(tensor, path)
    try:
        onnx.checker.check_model(str(path))
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:
        raise ModelError(f"{path}: the ONNX checker refuses the file ({_short(error)}). Export it again.") from error
    return model


def _tensors(message: Any, onnx: Any) -> Iterator[Any]:
    """Every tensor anywhere in the file: initialisers, sparse ones, attributes, sub-graphs and functions."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if hasattr(value, "__len__") else (value,):
                yield from _tensors(inner, onnx)


def _check_location(tensor: Any, path: Path) -> None:
    location = next((e.value for e in tensor.external_data if e.key == "location"), "")
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    parts = windows.parts  # splits at both kinds of slash
    fault = ""
    if not location or posix.is_absolute() or windows.is_absolute() or windows.drive or ".." in parts:
        fault = "points outside the folder of the model"
    else:
        place = path.parent
        for part in parts:
            place = place / part
            if place.is_symlink():
                fault = "is a link"
        if not fault and not place.is_file():
            fault = "does not exist"
        elif not fault and place.stat().st_nlink > 1:
            fault = "is a hard link"
    if fault:
        raise ModelError(
            f"{path}: the external data {location!r} of tensor {tensor.name!r} {fault}; allowed are plain files beside "
            "the model. Save it as one file with onnx.save(onnx.load(FILE), NEW)."
        )


def _input(model: Any, path: Path) -> tuple[str, int | None, tuple[int, ...]]:
    """Name, fixed batch size (None: free) and shape per example of the only input."""
    stored = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in stored]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise ModelError(
            f"{path}: {len(inputs)} inputs and {len(model.graph.output)} outputs; a classifier has one of each."
        )
    kind = inputs[0].type.tensor_type
    dims = [d.dim_value if d.HasField("dim_value") else (d.dim_param or "?") for d in kind.shape.dim]
    if kind.elem_type != 1:
        raise ModelError(f"{path}: the input must be float32; export the net so.")
    if len(dims) < 2 or not all(isinstance(d, int) and d > 0 for d in dims[1:]):
        raise ModelError(
            f"{path}: the input has shape {dims}; allowed is [N, ...] with fixed sizes behind the batch axis."
        )
    batch = dims[0] if isinstance(dims[0], int) and dims[0] > 0 else None
    if batch is not None and batch > 64:
        raise ModelError(f"{path}: exported for batches of exactly {batch}; export it with a free batch axis.")
    return inputs[0].name, batch, tuple(int(d) for d in dims[1:])


def _quiet(runtime: Any) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    return options


def _convert(converter: Any, model: Any, path: Path) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # a layer that is only guessed from its name is no conversion
            warnings.filterwarnings("error", message="No explicit conversion")
            return converter.ConvertModel(model)
    except Exception as error:
        raise ModelError(f"{path}: cannot be converted to torch ({_short(error)}).") from error


def _probes(shape: tuple[int, ...], batch: int) -> Tensor:
    """Noise from bright to nearly black, at least two batches of it: some nets are constant on bright noise."""
    count = batch * max(2, -(-8 // batch))
    x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([1.0, 0.3, 0.1, 0.03, 0.01]).repeat(count)[:count]
    return x * scale.view(-1, *[1] * len(shape))


def _reference(session: Any, name: str, x: Tensor, batch: int | None, path: Path) -> Tensor:
    try:
        parts = [session.run(None, {name: part.numpy()})[0] for part in x.split(batch or len(x))]
        expected = torch.from_numpy(np.concatenate(parts))
    except Exception as error:
        raise ModelError(f"{path}: onnxruntime cannot run the net ({_short(error)}).") from error
    if expected.dim() < 1 or len(expected) != len(x) or not bool(expected.isfinite().all()):
        raise ModelError(
            f"{path}: answers shape {list(expected.shape)} to a batch of {len(x)}"
            f"{'' if bool(expected.isfinite().all()) else ' with NaN or infinite numbers'}; "
            "a classifier answers finite logits [N, classes]."
        )
    return expected.flatten(1) if expected.dim() > 2 else expected


def _compare(net: nn.Module, x: Tensor, expected: Tensor, path: Path, fixed: str) -> None:
    x = x.clone().requires_grad_()
    try:
        logits = net(x)
        agree = logits.shape == expected.shape
    except Exception as error:
        raise ModelError(f"{path}: the converted net fails on a batch of {len(x)} ({_short(error)}).{fixed}") from error
    gap = float((logits - expected).detach().abs().max() / expected.abs().max().clamp(min=1e-3)) if agree else 1.0
    if not gap <= TOLERANCE:
        raise ModelError(
            f"{path}: the converted net answers differently from onnxruntime (relative difference {gap:.2g}, allowed "
            f"{TOLERANCE:g}), so no attack on it would mean anything.{fixed}"
        )
    pull = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    gradient = None
    if logits.requires_grad:
        (gradient,) = torch.autograd.grad(logits, x, pull, allow_unused=True)
    flat = gradient is not None and torch.equal(gradient, torch.zeros_like(gradient))
    # zero everywhere is right for a net that is constant on the probes, and wrong for one that is not
    if gradient is None or not gradient.isfinite().all() or (flat and not _constant(expected)):
        raise ModelError(
            f"{path}: the converted net gives no usable gradient (rounding or a lookup inside it?). "
            "Wrap its onnxruntime session in mohs.models.BlackBox and use attacks that need answers only."
        )


def _constant(logits: Tensor) -> bool:
    return torch.equal(logits, logits[:1].expand_as(logits))

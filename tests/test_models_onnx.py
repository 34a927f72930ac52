"""ONNX nets: they load with gradients where they answer like onnxruntime; the unsafe and the different are refused."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mohs import models
from mohs.errors import ModelError

SHARED = Path(os.environ.get("MOHS_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def refused(match: str, spec: object) -> None:
    with pytest.raises(ModelError, match=match):
        models.load(str(spec))


def onnx_or_skip() -> Any:
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
    if not importlib.util.find_spec("onnx2pytorch"):
        pytest.skip("onnx2pytorch is not installed (requirements-onnx.txt)")
    return onnx


def build(path: Path, layers: list[tuple[str, dict]], batch: int | str = "N", shape: tuple = (4,)) -> Path:
    """A chain of layers ``x -> ... -> y`` with one 4 x 3 weight where a layer is a MatMul."""
    onnx = onnx_or_skip()
    from onnx import TensorProto, helper, numpy_helper

    weight = torch.linspace(-1, 1, 12).reshape(4, 3).numpy()
    names = ["x", *(f"h{k}" for k in range(len(layers) - 1)), "y"]
    chain = [
        helper.make_node(op, [names[k], "w"] if op == "MatMul" else [names[k]], [names[k + 1]], **options)
        for k, (op, options) in enumerate(layers)
    ]
    graph = helper.make_graph(
        chain,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", "K"])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(path))
    return path


DENSE = [("Flatten", {}), ("MatMul", {}), ("Relu", {})]


@pytest.mark.parametrize("hidden", [False, True])
def test_onnx_is_the_net_it_came_from(tmp_path: Path, hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(tmp_path / "m.onnx", DENSE, shape=(1, 2, 2))
    if hidden:
        for name in [k for k in sys.modules if k.split(".")[0] in ("torchvision", "onnx2pytorch")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "torchvision", None)
    model = models.load(str(path))
    x = torch.rand(5, 1, 2, 2, requires_grad=True)
    expected = (x.flatten(1) @ torch.linspace(-1, 1, 12).reshape(4, 3)).relu()
    assert torch.allclose(model(x), expected, atol=1e-6)
    assert torch.allclose(model(x.flatten(1)), expected, atol=1e-6)  # any shape of as many numbers
    ours, theirs = (torch.autograd.grad(z.sum(), x, retain_graph=True)[0] for z in (model(x), expected))
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert "agree with onnxruntime" in models.loading_notes(model)[0]
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ModelError, match="takes 4 numbers per input"):
        model(torch.rand(2, 5))
    if hidden:
        assert sys.modules["torchvision"] is None
        assert not [k for k in sys.modules if k.startswith("torchvision.")]


def test_onnx_with_a_fixed_batch_serves_others_when_it_can(tmp_path: Path) -> None:
    model = models.load(str(build(tmp_path / "m.onnx", DENSE, batch=1)))
    assert model(torch.rand(7, 4)).shape == (7, 3)
    assert "batches of 1" in models.loading_notes(model)[1]
    refused("batches of exactly 65", build(tmp_path / "m.onnx", DENSE, batch=65))


def test_onnx_without_gradient(tmp_path: Path) -> None:
    refused("no usable gradient", build(tmp_path / "m.onnx", [("MatMul", {}), ("Round", {})]))
    dead = build(tmp_path / "m.onnx", [("MatMul", {}), ("Clip", {})])  # differentiable where it matters
    assert models.load(str(dead))(torch.rand(1, 4)).shape == (1, 3)


def test_onnx_constant_on_noise_is_no_missing_gradient(tmp_path: Path) -> None:
    layers = [("Neg", {}), ("Relu", {}), ("MatMul", {})]
    assert models.load(str(build(tmp_path / "m.onnx", layers)))(-torch.ones(1, 4)).abs().sum() > 0


def test_onnx_that_converts_wrongly_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(tmp_path / "m.onnx", DENSE)
    models.load(str(path))
    import onnx2pytorch

    class Off(onnx2pytorch.ConvertModel):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.001

    monkeypatch.setattr(onnx2pytorch, "ConvertModel", Off)
    refused("differently from onnxruntime \\(relative difference 0.001, allowed 0.0001\\)", path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"shape": ()}, "allowed is \\[N, ...\\]"),
        ({"shape": ("height",)}, "fixed sizes behind the batch axis"),
        ({"layers": [("MatMul", {}), ("NoSuchLayer", {})]}, "checker refuses"),
        ({"layers": [("MatMul", {}), ("ReduceSum", {"keepdims": 0})]}, "answers shape|fails|cannot run"),
        ({"layers": [("MatMul", {}), ("Log", {})]}, "NaN or infinite"),
    ],
)
def test_onnx_that_is_no_classifier(tmp_path: Path, options: dict, match: str) -> None:
    refused(match, build(tmp_path / "m.onnx", **{"layers": DENSE, **options}))


@pytest.mark.parametrize(
    ("data", "match"),
    [(b"", "empty"), (b"<!doctype html>", "HTML"), (b"nonsense", "not an ONNX"), (b"\x08\x09", "checker refuses")],
)
def test_onnx_damage(tmp_path: Path, data: bytes, match: str) -> None:
    onnx_or_skip()
    (tmp_path / "m.onnx").write_bytes(data)
    refused(match, tmp_path / "m.onnx")


def external(path: Path, location: str) -> Path:
    onnx = onnx_or_skip()
    model = onnx.load(str(build(path, DENSE)))
    tensor = model.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    data = bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    (path.parent / "w.bin").write_bytes(data)
    return path


def test_onnx_external_data(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = folder / "m.onnx"
    assert models.load(str(external(path, "w.bin")))(torch.rand(2, 4)).shape == (2, 3)
    (tmp_path / "secret").write_bytes((folder / "w.bin").read_bytes())
    for location in ("../secret", str(tmp_path / "secret"), "C:\\secret", "..\\secret", "\\\\host\\share", ""):
        refused("points outside the folder of the model", external(path, location))
    refused("does not exist", external(path, "none.bin"))
    (folder / "link.bin").symlink_to(tmp_path / "secret")
    (folder / "linked").symlink_to(tmp_path)
    refused("is a link", external(path, "link.bin"))
    refused("is a link", external(path, "linked/secret"))
    os.link(tmp_path / "secret", folder / "hard.bin")
    refused("is a hard link; allowed are", external(path, "hard.bin"))


def test_onnx_external_data_in_attributes(tmp_path: Path) -> None:
    onnx = onnx_or_skip()
    path = build(tmp_path / "m.onnx", DENSE)
    model = onnx.load(str(path))
    tensor = onnx.TensorProto(data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL, name="hidden")
    tensor.external_data.add(key="location", value="/etc/hostname")
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["c"], value=tensor))
    path.write_bytes(model.SerializeToString())
    refused("'/etc/hostname' of tensor 'hidden' points outside", path)


def test_onnx_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.onnx").write_bytes(b"x")
    for name in ("onnx", "onnxruntime", "onnx2pytorch"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            refused("python -m pip install onnx onnxruntime", tmp_path / "m.onnx")


@pytest.mark.parametrize("name", ["mnistfc/mnist-net_256x2", "verivital/Convnet_maxpool", "test/test_unsat"])
def test_onnx_nets_of_others(name: str) -> None:
    onnx_or_skip()
    path = SHARED / "data" / "vnncomp2021" / f"{name}.onnx"
    if not path.is_file():
        pytest.skip("no nets of the verification competition beside the repository (MOHS_SHARED)")
    assert models.load(str(path)).eval() is not None

"""Programs of torch.export: they load with gradients, and what is unsafe or frozen is refused."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mohs import models
from mohs.errors import ModelError
from mohs.models._pt2 import _is_harmless, _is_plain_tree

FREE = ({0: torch.export.Dim.DYNAMIC},)


def refused(match: str, spec: object) -> None:
    with pytest.raises(ModelError, match=match):
        models.load(str(spec))


class Small(nn.Module):
    """Layers that leave a trace in an exported program: buffers, constants, shapes, attention, dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.drop = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.scale = torch.ones(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.gelu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.drop(x.mean(1) * self.scale)).reshape(x.shape[0], -1)


def save_pt2(path: Path, model: nn.Module | None = None, shapes: Any = FREE, batch: int = 2) -> Path:
    program = torch.export.export(model or Small().eval(), (torch.rand(batch, 1, 6, 6),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def good_pt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pt2(tmp_path_factory.mktemp("pt2") / "good.pt2")


def test_pt2_is_the_net_it_came_from(good_pt2: Path) -> None:
    model, original = models.load(str(good_pt2)), Small().eval()
    x = torch.rand(5, 1, 6, 6, requires_grad=True)
    assert torch.allclose(model(x), original(x), atol=1e-6)
    ours, theirs = (torch.autograd.grad(m(x)[:, 0].sum(), x)[0] for m in (model, original))
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert model(x[:1]).shape == (1, 3)
    assert model.eval() is model.train() is model
    assert not model.training
    with pytest.raises(ModelError, match="takes inputs \\[N, 1, 6, 6\\], got \\[2, 1, 7, 7\\]"):
        model(torch.rand(2, 1, 7, 7))


def test_a_factory_may_return_an_exported_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pt2(tmp_path / "m.pt2")
    (tmp_path / "exported_factory.py").write_text(
        f"import torch\ndef make():\n    return torch.export.load({str(tmp_path / 'm.pt2')!r}).module()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert models.load("exported_factory:make")(torch.rand(3, 1, 6, 6)).shape == (3, 3)


def test_pt2_with_a_fixed_batch(tmp_path: Path) -> None:
    refused("batches of exactly 2.*Dim.DYNAMIC", save_pt2(tmp_path / "m.pt2", shapes=None))


def test_pt2_in_training_mode(tmp_path: Path) -> None:
    refused("training mode. Call model.eval\\(\\)", save_pt2(tmp_path / "m.pt2", Small().train()))
    dropping = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 2)).train()
    refused("dropout.default was exported in training mode", save_pt2(tmp_path / "m.pt2", dropping))


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x


def test_pt2_that_is_no_classifier(tmp_path: Path) -> None:
    refused("must answer one tensor", save_pt2(tmp_path / "m.pt2", Two()))
    free = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC},)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    refused("only the batch dimension may be free", save_pt2(tmp_path / "m.pt2", model, free))
    program = torch.export.export(nn.Bilinear(2, 2, 2), (torch.rand(2, 2), torch.rand(2, 2)))
    torch.export.save(program, tmp_path / "m.pt2")
    refused("takes 2 inputs", tmp_path / "m.pt2")


def test_pt2_damage(tmp_path: Path, good_pt2: Path) -> None:
    path = tmp_path / "m.pt2"
    for data, match in (
        (b"", "is empty"),
        (b"<html></html>", "HTML"),
        (b"nonsense", "not a .pt2 archive"),
        (good_pt2.read_bytes()[:2000], "not a .pt2 archive"),
    ):
        path.write_bytes(data)
        refused(match, path)


def rebuilt(source: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """The same archive with other members, laid out as torch lays it out."""
    with zipfile.ZipFile(source) as archive:
        members = {i.filename.partition("/")[2]: archive.read(i) for i in archive.infolist()}
    change(members)
    writer = torch._C.PyTorchFileWriter(str(target))
    own = {".data/serialization_id", ".data/version", "version"}
    for name, data in members.items():
        if name not in own:
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return target


def edit(name: str, change: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    def apply(members: dict[str, bytes]) -> None:
        content = json.loads(members[name])
        change(content)
        members[name] = json.dumps(content).encode()

    return apply


def put(name: str, data: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.update({name: data})


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


PROGRAM = "models/model.json"


def nodes(content: dict) -> list[dict]:
    return content["graph_module"]["graph"]["nodes"]


def symbol(content: dict) -> dict:
    return content["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]["as_expr"]


def first_weight(content: dict) -> dict:
    return next(iter(content["config"].values()))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (put("data/aotinductor/model/a.so", b"x"), "data/aotinductor"),
        (put("data/weights/model.pt", b"x"), "data/weights/model.pt"),
        (put("data/constants/custom_obj_0", b"x"), "custom_obj_0"),
        (put("serialized_state_dict.pt", b"x"), "serialized_state_dict"),
        (
            edit("data/weights/model_weights_config.json", lambda c: first_weight(c).update(use_pickle=True)),
            "as a pickle",
        ),
        (
            edit(
                "data/constants/model_constants_config.json", lambda c: first_weight(c).update(path_name="custom_obj_0")
            ),
            "as a pickle or object",
        ),
        (edit(PROGRAM, lambda c: symbol(c).update(expr_str="__import__('os').system('true')")), "expr_str"),
        (edit(PROGRAM, lambda c: nodes(c)[0].update(target="torch.hub.load")), "target 'torch.hub.load'"),
        (edit(PROGRAM, lambda c: nodes(c)[0].update(target="torch.ops.aten.from_file.default")), "from_file"),
        (edit(PROGRAM, lambda c: nodes(c)[0].update(target="_operator.methodcaller")), "methodcaller"),
        (edit(PROGRAM, lambda c: nodes(c)[0]["inputs"][0].update(name="x=print(1)")), "x=print"),
        (edit(PROGRAM, lambda c: c["range_constraints"].update({"s(0)": {}})), "not a plain name"),
        (
            edit(
                PROGRAM,
                lambda c: c["graph_module"]["module_call_graph"][0]["signature"].update(
                    in_spec='[1, {"type": "collections.defaultdict", "context": "null", "children_spec": []}]'
                ),
            ),
            "in_spec",
        ),
        (put(PROGRAM, b"[]"), "program is damaged"),
        (put(PROGRAM, b"{"), "not a readable .pt2"),
        (edit(PROGRAM, lambda c: c.pop("graph_module")), "cannot read this program"),
    ],
)
def test_pt2_gate(tmp_path: Path, good_pt2: Path, change: Callable, match: str) -> None:
    refused(match, rebuilt(good_pt2, tmp_path / "m.pt2", change))


def test_pt2_rebuilt_without_change_still_loads(tmp_path: Path, good_pt2: Path) -> None:
    path = rebuilt(good_pt2, tmp_path / "m.pt2", lambda members: None)
    x = torch.rand(2, 1, 6, 6)
    assert torch.equal(models.load(str(path))(x), models.load(str(good_pt2))(x))


def test_pt2_runs_no_code(tmp_path: Path, good_pt2: Path) -> None:
    trace, buffer = tmp_path / "ran", io.BytesIO()
    torch.save((Hostile(trace),), buffer)
    path = rebuilt(good_pt2, tmp_path / "m.pt2", put("data/sample_inputs/model.pt", buffer.getvalue()))
    refused("sample inputs are not plain tensors", path)

    def hide(members: dict[str, bytes]) -> None:
        config = json.loads(members["data/weights/model_weights_config.json"])
        first_weight(config).update(use_pickle=True, path_name="weight_0")
        members["data/weights/model_weights_config.json"] = json.dumps(config).encode()
        members["data/weights/weight_0"] = pickle.dumps(Hostile(trace))

    refused("as a pickle", rebuilt(good_pt2, tmp_path / "m.pt2", hide))
    code = f"__import__('pathlib').Path({str(trace)!r}).touch()"
    guarded = rebuilt(good_pt2, tmp_path / "m.pt2", edit(PROGRAM, lambda c: c.update(guards_code=[code])))
    models.load(str(guarded))(torch.rand(2, 1, 6, 6))  # guards are source code; they are never run
    assert not trace.exists()


def test_pt2_compressed_archive_is_refused(tmp_path: Path, good_pt2: Path) -> None:
    with zipfile.ZipFile(good_pt2) as old, zipfile.ZipFile(tmp_path / "m.pt2", "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    refused("compressed", tmp_path / "m.pt2")


@pytest.mark.parametrize(
    ("expression", "good"),
    [
        ("Symbol('s77', positive=True, integer=True)", True),
        ("Min(Integer(8), Mul(Integer(8), Symbol('s77', positive=True, integer=True)))", True),
        ("s0 + 2*s1 >= 4", True),
        ("(1).__class__", False),
        ("exit()", False),
        ("Symbol('__import__(\"os\")')", False),
        ("[x for x in s0]", False),
        ("lambda: 0", False),
        ("Symbol('s0', evaluate=False)", False),
        ("s0; s1", False),
    ],
)
def test_shape_expressions(expression: str, good: bool) -> None:
    assert _is_harmless(expression) is good


def test_tree_descriptions() -> None:
    leaf = '{"type": null, "context": null, "children_spec": []}'
    assert _is_plain_tree(f"[1, {leaf}]")
    assert not _is_plain_tree('[1, {"type": "os.path", "context": null, "children_spec": []}]')
    names = '{{"type": "builtins.dict", "context": "[\\"{}\\"]", "children_spec": [{}]}}'
    assert _is_plain_tree("[1, " + names.format("x", leaf) + "]")
    assert not _is_plain_tree("[1, " + names.format("x=print(1)", leaf) + "]")
    assert not _is_plain_tree("{")

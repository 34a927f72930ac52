"""Models: nets, normalisation, weights on disk and specifications."""

from __future__ import annotations

import collections
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mohs import models
from mohs.errors import ModelError
from mohs.models import loading

SHARED = Path(os.environ.get("MOHS_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(collections.OrderedDict(fc=nn.Linear(3, 2), bn=nn.BatchNorm1d(2)))


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module beside the working directory, as users have it."""
    (tmp_path / "their_nets.py").write_text(
        "import collections\nfrom torch import nn\nimport torch\n"
        "def make():\n"
        "    return nn.Sequential(collections.OrderedDict(fc=nn.Linear(3, 2), bn=nn.BatchNorm1d(2)))\n"
        "class Net(nn.Module):\n    pass\n"
        "ready = nn.Dropout()\nnumber = 3\n"
        "def fails():\n    raise KeyError('no such thing')\n"
        "def leaves():\n    raise SystemExit(0)\n"
        "def nothing():\n    return None\n"
        "def needs(width):\n    return nn.Linear(width, 2)\n"
    )
    (tmp_path / "their_broken.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    for name in ("their_nets", "their_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "their_nets:make"


def refused(match: str, spec: Any, **options: Any) -> None:
    with pytest.raises(ModelError, match=match):
        models.load(spec, **options)


# --- nets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(models.NETS))
def test_reference_nets_answer_logits_and_load_by_name(name: str) -> None:
    model = models.load(name)
    x = torch.rand(2, 1, 28, 28)
    assert model(x).shape == (2, 10)
    assert not any(m.training for m in model.modules())


@settings(max_examples=15, deadline=None)
@given(st.integers(4, 33), st.integers(1, 3), st.integers(2, 5))
def test_small_cnn_fits_any_size(size: int, channels: int, classes: int) -> None:
    assert models.small_cnn(channels, classes, size)(torch.rand(1, channels, size, size)).shape == (1, classes)


def test_small_cnn_is_the_published_architecture() -> None:
    shapes = [list(p.shape) for p in models.small_cnn().parameters()]
    assert shapes == [[16, 1, 4, 4], [16], [32, 16, 4, 4], [32], [100, 1568], [100], [10, 100], [10]]
    with pytest.raises(ModelError, match="at least 4; got 3"):
        models.small_cnn(size=3)


@pytest.mark.parametrize("width", [1, 16])
def test_madry_cnn_is_as_wide_as_asked(width: int) -> None:
    shapes = [list(p.shape) for p in models.madry_cnn(width).parameters() if p.dim() > 1]
    filters, hidden = 2 * width, 64 * width
    assert shapes == [[filters, 1, 5, 5], [2 * filters, filters, 5, 5], [hidden, 2 * filters * 49], [10, hidden]]
    with pytest.raises(ModelError, match="width of at least 1"):
        models.madry_cnn(0)


def test_fc_is_500_150_10() -> None:
    widths = [m.out_features for m in models.fc_500_150_10() if isinstance(m, nn.Linear)]
    assert widths == [500, 150, 10]


def test_normalized_is_the_net_on_normalised_inputs() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    x = torch.rand(2, 3, 4, 4)
    expected = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    model = models.normalized(nn.Identity(), mean, std)
    assert torch.allclose(model(x), expected)
    assert {"mean", "std"} <= set(model.state_dict())
    assert torch.allclose(models.normalized(nn.Identity(), 0.5, 0.5)(x), x * 2 - 1)
    assert not models.normalized(nn.Identity().eval(), 0.5, 0.5).training


@pytest.mark.parametrize(("mean", "std"), [((0, 0), (1, 1, 1)), (0, 0), (0, -1), (0, float("nan")), ((), ())])
def test_normalized_refuses(mean: object, std: object) -> None:
    with pytest.raises(ModelError, match="normalized\\(\\)"):
        models.normalized(nn.Identity(), mean, std)  # type: ignore[arg-type]


# --- weights on disk -----------------------------------------------------------------------------------------------


def test_save_and_read(tmp_path: Path) -> None:
    model, path = net(), tmp_path / "deep" / "w.safetensors"
    models.save_weights(model, path, {"arch": "x", "numbers": {"clean": 0.9}})
    state = models.read_weights(path)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert models.read_metadata(path) == {"arch": "x", "numbers": {"clean": 0.9}}
    first = path.read_bytes()
    models.save_weights(model, path, {"numbers": {"clean": 0.9}, "arch": "x"})
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]


def test_save_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    models.save_weights(net(), path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        models.save_weights(nn.Linear(9, 9), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_save_refuses(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="must end in"):
        models.save_weights(net(), tmp_path / "w.pt")
    with pytest.raises(ModelError, match="JSON"):
        models.save_weights(net(), tmp_path / "w.safetensors", {"net": net()})
    with pytest.raises(ModelError, match="_extra_state"):
        models.save_weights(models.BlackBox(len), tmp_path / "w.safetensors")


def test_shared_tensors_can_be_saved(tmp_path: Path) -> None:
    a = nn.Linear(3, 3)
    tied = nn.Sequential(a, nn.ReLU(), a)
    models.save_weights(tied, tmp_path / "w.safetensors")
    assert set(models.read_weights(tmp_path / "w.safetensors")) == set(tied.state_dict())


def test_weights_hash_sees_names_types_shapes_and_values() -> None:
    base = net()
    others = [net(), net().half(), nn.Sequential(collections.OrderedDict(fd=base.fc, bn=base.bn))]
    others[0].state_dict()["bn.running_mean"][0] += 1e-7
    hashes = {models.weights_hash(m) for m in [base, *others]}
    assert len(hashes) == 4
    assert models.weights_hash(net()) == models.weights_hash(net().train()) == models.weights_hash(base)
    assert len(models.weights_hash(base)) == 64
    assert models.weights_hash(nn.Linear(2, 2).bfloat16())
    zeros = [torch.zeros(2, 6), torch.zeros(6, 2), torch.zeros(12, dtype=torch.int32), torch.zeros(12)]
    assert len({models.weights_hash(nn.ParameterList([nn.Parameter(z, requires_grad=False)])) for z in zeros}) == 4


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
def test_factory_with_weights(tmp_path: Path, factory: str, name: str) -> None:
    trained = net()
    if name == "w.safetensors":
        models.save_weights(trained, tmp_path / name)
    else:
        torch.save(trained.state_dict(), tmp_path / name)
    model = models.load(factory, weights=tmp_path / name)
    assert models.weights_hash(model) == models.weights_hash(trained)
    assert not model.training
    assert models.loading_notes(model) == ()


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "net"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", ""])
def test_wrapped_weights_are_unwrapped_and_it_is_said(
    tmp_path: Path, factory: str, wrapper: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = {prefix + k: v for k, v in net().state_dict().items()}
    torch.save({wrapper: state, "epoch": 3}, tmp_path / "w.pt")
    with caplog.at_level(logging.INFO, "mohs.models"):
        model = models.load(factory, weights=tmp_path / "w.pt")
    assert models.weights_hash(model) == models.weights_hash(net())
    notes = models.loading_notes(model)
    assert repr(wrapper) in notes[0]
    assert len(notes) == 1 + bool(prefix)
    assert all(note in caplog.text for note in notes)


def test_a_prefix_of_the_net_itself_stays(tmp_path: Path) -> None:
    inner = nn.Sequential(collections.OrderedDict(module=nn.Linear(2, 2)))
    state = {k: v.clone() for k, v in inner.state_dict().items()}
    from mohs.models.weights import fit

    assert fit(inner, state, "here") == []


def test_small_adaptations(tmp_path: Path, factory: str) -> None:
    state = {k: v for k, v in net().state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pt")
    assert models.load(factory, weights=tmp_path / "w.pt")(torch.zeros(1, 3)).shape == (1, 2)
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / "w.pt")
    model = models.load(factory, weights=tmp_path / "w.pt")
    assert "float16" in models.loading_notes(model)[0]
    assert next(model.parameters()).dtype == torch.float32


def state_with(**changes: object) -> dict:
    state = dict(net().state_dict())
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (state_with(fc__bias=None), "the file lacks fc.bias\\."),
        (state_with(head=torch.zeros(2)), "the net has no head\\."),
        (state_with(fc__weight=torch.zeros(2, 4)), "fc.weight \\(\\[2, 4\\] in the file, \\[2, 3\\] in the net\\)"),
        (state_with(fc__weight=torch.full((2, 3), float("nan"))), "NaN or infinite weights in fc.weight"),
        ({"module.fc.weight": torch.zeros(2, 3), "fc.bias": torch.zeros(2)}, "lacks .*no module.fc.weight"),
        ({f"k{i}": torch.zeros(1) for i in range(9)}, "and 3 more"),
        ({"epoch": 3, "optimizer": {}}, "no state dict but entries epoch, optimizer"),
        ({}, "no state dict"),
        (torch.zeros(3), "no state dict but Tensor"),
        (net(), "refused, it needs more than plain tensors"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, factory: str, content: object, match: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    refused(match, factory, weights=tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "is empty"),
        (b"\n <!DOCTYPE html><html>Sign in</html>", "looks like an HTML page"),
        (b"<HTML><body>404</body></HTML>", "looks like an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"complete nonsense", "safetensors|cannot be read|refused"),
        (b"PK\x03\x04 cut off", "safetensors|cannot be read"),
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, factory: str, name: str, data: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(data)
    refused(match, factory, weights=tmp_path / name)


def test_weights_in_the_wrong_place(tmp_path: Path, factory: str) -> None:
    refused("does not exist", factory, weights=tmp_path / "none.pt")
    refused("is a directory", factory, weights=tmp_path)
    (tmp_path / "w.h5").write_bytes(b"x")
    refused("allowed endings are .safetensors, .pt, .pth", factory, weights=tmp_path / "w.h5")
    models.save_weights(net(), tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[:-5])
    refused("damaged or no safetensors", factory, weights=tmp_path / "w.safetensors")


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("old", [False, True])
def test_weights_run_no_pickled_code(tmp_path: Path, factory: str, old: bool) -> None:
    trace, content = tmp_path / "ran", {"state_dict": Hostile(tmp_path / "ran")}
    if old:
        (tmp_path / "w.pt").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / "w.pt")
    refused("refused|cannot be read", factory, weights=tmp_path / "w.pt")
    assert not trace.exists()


def test_weights_of_others() -> None:
    path = SHARED / "data" / "models" / "mnist_fast_pgd.pth"
    if not path.is_file():
        pytest.skip("no trained nets of others beside the repository (MOHS_SHARED)")
    assert models.load("small_cnn", weights=path)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


# --- specifications ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["", None, 3, "nonsense", ":", "package:", ":make", "some/path:make"])
def test_unknown_spec_lists_the_allowed_ones(spec: object) -> None:
    refused("bundled:NAME, small_cnn, .*FILE.onnx", spec)


def test_factories(factory: str) -> None:
    path = list(sys.path)
    assert isinstance(models.load("their_nets:ready"), nn.Dropout)
    assert isinstance(models.load("their_nets:Net"), nn.Module)
    assert isinstance(models.load("torch.nn:Identity"), nn.Identity)
    assert sys.path == path


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("their_nets:fails", "fails\\(\\) raised KeyError: 'no such thing'"),
        ("their_nets:leaves", "leaves\\(\\) raised SystemExit"),
        ("their_nets:needs", "called without arguments"),
        ("their_nets:nothing", "returned a NoneType"),
        ("their_nets:number", "number is a int"),
        ("their_nets:absent", "has no absent"),
        ("their_nets:make.inner", "has no make.inner"),
        ("their_broken:make", "a_package_that_is_not_there"),
        ("no_such_package_here:make", "importing no_such_package_here failed"),
        (".relative:make", "importing .relative failed"),
    ],
)
def test_factories_that_fail(factory: str, spec: str, match: str) -> None:
    refused(match, spec)


def test_weights_file_names_its_net(tmp_path: Path, factory: str) -> None:
    linear = models.linear(4, 3)
    models.save_weights(net(), tmp_path / "a.safetensors", {"arch": factory})
    assert models.weights_hash(models.load(str(tmp_path / "a.safetensors"))) == models.weights_hash(net())
    models.save_weights(linear, tmp_path / "b.safetensors")
    refused("say which net", str(tmp_path / "b.safetensors"))
    refused("do not fit", str(tmp_path / "b.safetensors"), arch="linear")
    torch.save(models.linear().state_dict(), tmp_path / "c.pth")
    assert models.load(str(tmp_path / "c.pth"), arch="linear")(torch.zeros(1, 784)).shape == (1, 10)


def test_arguments_that_do_not_belong_together(tmp_path: Path) -> None:
    refused("brings its own weights", "bundled:fashion-natural", weights="w.pt")
    refused("brings its own weights", "x.onnx", weights="w.pt")
    refused("names the net of a weights file", "small_cnn", arch="linear")
    refused("does not exist", str(tmp_path / "none.pt2"))
    refused("does not exist", str(tmp_path / "none.onnx"))


def test_bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "BUNDLED", tmp_path)
    refused("none yet", "bundled:demo")
    trained = models.small_cnn()
    path = models.save_bundled(trained, "demo", arch="small_cnn", recipe="made up", numbers={"clean": 0.5})
    assert models.weights_hash(models.load("bundled:demo")) == models.weights_hash(trained)
    assert models.bundled_info("demo")["numbers"] == {"clean": 0.5}
    assert models.available()[0] == ("bundled:demo", "made up")
    refused("there are bundled:demo", "bundled:other")
    with pytest.raises(ModelError, match="do not fit"):
        models.save_bundled(trained, "wrong", arch="lenet", recipe="", numbers={})
    with pytest.raises(ModelError, match="no reference net"):
        models.save_bundled(trained, "wrong", arch="alexnet", recipe="", numbers={})
    assert not (tmp_path / "wrong.safetensors").exists()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    refused("SHA-256", "bundled:demo")
    sidecar = path.with_suffix(".json")
    sidecar.write_text(json.dumps({"arch": 3}))
    refused("description is damaged", "bundled:demo")
    sidecar.write_text("{")
    refused("description is damaged", "bundled:demo")


def test_every_bundled_net_loads() -> None:
    for name in loading._bundled_names():
        assert models.load(f"bundled:{name}")(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
        assert {"arch", "recipe", "sha256", "numbers"} <= set(models.bundled_info(name))


# --- the package --------------------------------------------------------------------------------------------------


def test_heavy_packages_are_not_imported() -> None:
    code = (
        "import sys; import mohs.models, mohs.data; "
        "print([m for m in ('onnx', 'onnxruntime', 'torchvision', 'PIL', 'safetensors') if m in sys.modules])"
    )
    root = Path(models.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"

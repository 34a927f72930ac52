"""CIFAR batches, npz archives and image folders: they load, bad ones are named, hostile ones run nothing."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mohs.data import load
from mohs.errors import DataError


def refused(match: str, spec: str, **options: Any) -> None:
    with pytest.raises(DataError, match=match):
        load(spec, **options)


# --- cifar ----------------------------------------------------------------------------------------


def python2_batch(data: np.ndarray, labels: list[int], fortran: bool = False) -> bytes:
    """A batch as Python 2 wrote it: protocol 2, byte strings as strings, numpy's old names."""

    def text(b: bytes) -> bytes:
        return b"U" + bytes([len(b)]) + b if len(b) < 256 else b"T" + struct.pack("<I", len(b)) + b

    def number(k: int) -> bytes:
        return b"J" + struct.pack("<i", k)

    start = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    shape = number(data.shape[0]) + number(data.shape[1]) + b"\x86"
    raw = data.tobytes(order="F" if fortran else "C")
    state = b"(" + number(1) + shape + dtype + (b"\x88" if fortran else b"\x89") + text(raw) + b"tb"
    listed = b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + text(b"data") + start + state + text(b"labels") + listed + b"u."


@pytest.mark.parametrize("form", ["python 2", "python 2, column order", "protocol 2", "protocol 4", "protocol 5"])
def test_cifar_round_trip(tmp_path: Path, form: str) -> None:
    x = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    if form.startswith("python 2"):
        batch = python2_batch(x, [3, 8, 8], fortran="column" in form)
    else:
        batch = pickle.dumps({b"data": x, b"labels": [3, 8, 8]}, protocol=int(form[-1]))
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "test_batch").write_bytes(batch)
    for where in (tmp_path, folder):
        data = load(f"cifar10:{where}")
        assert torch.equal(data.x, torch.from_numpy(x).reshape(3, 3, 32, 32).float() / 255)
        assert [data.classes[k] for k in data.y] == ["cat", "ship", "ship"]


def test_cifar_train_joins_five_batches(tmp_path: Path) -> None:
    for k in range(1, 6):
        (tmp_path / f"data_batch_{k}").write_bytes(python2_batch(np.full((2, 3072), k, np.uint8), [k, k]))
    assert load(f"cifar10:{tmp_path}", split="train").y.tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    (tmp_path / "data_batch_4").unlink()
    refused("lacks data_batch_4", f"cifar10:{tmp_path}", split="train")


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


ZEROS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (b"", "not a readable batch"),
        (b"<html>", "not a readable batch"),
        (python2_batch(ZEROS, [0, 1])[:-400], "not a readable batch"),
        (pickle.dumps([1, 2]), "must hold 'data'"),
        (pickle.dumps({"data": ZEROS}), "must hold 'data'"),
        (pickle.dumps({"data": ZEROS, "labels": [0]}), "2 images but 1 labels"),
        (pickle.dumps({"data": ZEROS, "labels": [0, 10]}), "from 0 to 9"),
        (pickle.dumps({"data": ZEROS, "labels": [0, "1"]}), "from 0 to 9"),
        (pickle.dumps({"data": ZEROS[:, :-1], "labels": [0, 1]}, 4), "3072"),
        (pickle.dumps({"data": ZEROS.astype(np.float32), "labels": [0, 1]}, 4), "unsigned bytes"),
        (pickle.dumps({"data": np.array([{}], object), "labels": [0]}, 4), "unsigned bytes"),
        (
            python2_batch(ZEROS, [0, 1]).replace(struct.pack("<I", 6144), struct.pack("<I", 6000)),
            "not a readable",
        ),
        (python2_batch(ZEROS, [0, 1]).replace(b"J\x00\x0c\x00\x00", b"J\x01\x0c\x00\x00"), "damaged"),
        (b"cos\nsystem\n(U\x04trueo.", "asks for os.system"),
        (b"\x80\x02cnumpy.core.multiarray\nfromfile\n.", "asks for numpy.core.multiarray.fromfile"),
    ],
)
def test_cifar_refuses(tmp_path: Path, batch: bytes, match: str) -> None:
    (tmp_path / "test_batch").write_bytes(batch)
    refused(match, f"cifar10:{tmp_path}")


def test_cifar_runs_no_pickled_code(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    (tmp_path / "test_batch").write_bytes(pickle.dumps({"data": Hostile(trace), "labels": []}))
    refused("is refused", f"cifar10:{tmp_path}")
    assert not trace.exists()


# --- npz ------------------------------------------------------------------------------------------


def noise(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 1, 5, 6), dtype=np.uint8)


def test_npz_forms(tmp_path: Path) -> None:
    path, x = tmp_path / "d.npz", noise(4)
    np.savez_compressed(path, x=x, y=np.array([0, 1, 1, 0], np.uint8), classes=["cat", "dog"])
    data = load(f"npz:{path}")
    assert torch.equal(data.x, torch.from_numpy(x).float() / 255)
    assert data.classes == ("cat", "dog")
    np.savez(path, x=np.linspace(0, 1, 6).reshape(3, 2), y=[0, 1, 2])  # float64, tabular
    assert load(f"npz:{path}").x.dtype == torch.float32
    np.savez(path, x_train=x[:1], y_train=[1], x_test=x, y_test=[1, 0, 0, 0])
    assert len(load(f"npz:{path}", split="train")) == 1
    assert len(load(f"npz:{path}")) == 4


X4 = np.zeros((2, 1, 3, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"x": X4}, "needs arrays x and y"),
        ({"images": X4, "labels": [0, 1]}, "found images, labels"),
        ({"x": X4, "y": [0]}, "2 inputs but 1 labels"),
        ({"x": X4[:0], "y": np.zeros(0, int)}, "no examples"),
        ({"x": X4, "y": [0, -1]}, "negative labels in row 1"),
        ({"x": X4, "y": [0.0, 1.0]}, "whole numbers"),
        ({"x": X4, "y": np.eye(2, dtype=int)}, "argmax"),
        ({"x": X4, "y": [0, 2], "classes": ["a", "b"]}, "out of range in row 1"),
        ({"x": X4, "y": [0, 1], "classes": 3}, "list of texts"),
        ({"x": X4.astype(int), "y": [0, 1]}, "int64"),
        ({"x": X4[:, 0], "y": [0, 1]}, "x\\[:, None\\]"),
        ({"x": np.zeros((2, 32, 32, 3), np.uint8), "y": [0, 1]}, "transpose"),
        ({"x": X4 + 255.0, "y": [0, 1]}, "Divide by 255"),
        ({"x": X4 - 1e-3, "y": [0, 1]}, "rows 0 and 1"),
        ({"x": X4 + np.nan, "y": [0, 1]}, "NaN"),
        ({"x": X4, "y": np.array([0, {}], object)}, "pickle"),
    ],
)
def test_npz_refuses(tmp_path: Path, arrays: dict, match: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    refused(match, f"npz:{tmp_path / 'd.npz'}")


def test_npz_runs_no_pickled_code(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    np.savez(tmp_path / "d.npz", x=X4, y=np.array([Hostile(trace)], object))
    refused("pickle", f"npz:{tmp_path / 'd.npz'}")
    assert not trace.exists()


def test_npz_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.npz"
    path.write_bytes(b"<html>not found</html>")
    refused("not a readable npz", f"npz:{path}")
    np.savez_compressed(path, x=noise(50), y=np.zeros(50, int))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("not a readable npz", f"npz:{path}")
    path.write_bytes(whole[:300] + bytes(20) + whole[320:])
    refused("not a readable npz|is damaged", f"npz:{path}")
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
    claim = b"{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999, 1), }".ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header + claim + b"123")
        archive.writestr("y.npy", b"no header")
    refused("declares 9,999,999,999,999 bytes but holds 3", f"npz:{path}")
    monkeypatch.setattr("mohs.data._npz.MAX_BYTES", 1000)
    path.write_bytes(whole)
    refused("more than the 1,000 read", f"npz:{path}")


# --- folder ---------------------------------------------------------------------------------------


def picture(path: Path, mode: str = "L", size: tuple[int, int] = (6, 5), value: int = 0) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    Image.fromarray(np.full(shape, value, np.uint8), mode=None).save(path)


def test_folder_is_balanced_and_named(tmp_path: Path) -> None:
    for k in range(3):
        picture(tmp_path / "dog" / f"{k}.png", value=10 + k)
    picture(tmp_path / "cat" / "a.png", value=51)
    (tmp_path / "dog" / "notes.txt").write_text("ignored")
    (tmp_path / ".hidden").mkdir()
    data = load(f"folder:{tmp_path}")
    assert data.classes == ("cat", "dog")
    assert data.x.shape == (4, 1, 5, 6)
    assert data.y.tolist() == [0, 1, 1, 1]
    assert (data.x[:, 0, 0, 0] * 255).round().tolist() == [51, 10, 11, 12]


def test_folder_with_colour_and_splits(tmp_path: Path) -> None:
    picture(tmp_path / "test" / "a" / "1.png", "RGB", value=255)
    picture(tmp_path / "test" / "b" / "1.png", "L")
    picture(tmp_path / "train" / "a" / "1.png", "RGB")
    assert load(f"folder:{tmp_path}").x.shape == (2, 3, 5, 6)
    assert len(load(f"folder:{tmp_path}", split="train")) == 1


def test_folder_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = f"folder:{tmp_path}"
    refused("no sub-folders", spec)
    (tmp_path / "a").mkdir()
    refused("no images", spec)
    picture(tmp_path / "a" / "1.png")
    picture(tmp_path / "a" / "2.png", size=(5, 6))
    refused("same size", spec)
    picture(tmp_path / "a" / "2.png", "RGBA")
    refused("mode RGBA", spec)
    picture(tmp_path / "a" / "2.png")
    whole = (tmp_path / "a" / "2.png").read_bytes()
    (tmp_path / "a" / "2.png").write_bytes(b"<html>")
    refused("not an image", spec)
    (tmp_path / "a" / "2.png").write_bytes(whole[:45])
    refused("2.png: .*image", spec)
    monkeypatch.setattr("mohs.data._folder.MAX_PIXELS", 29)
    refused("pixels, which is refused", spec)


def test_folder_refuses_pixel_bombs_by_their_header(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    # a bitmap header that claims 60,000 x 60,000 pixels
    head = struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 60000, 60000, 1, 24, *[0] * 6)
    (tmp_path / "a" / "1.bmp").write_bytes(head)
    refused("pixels, which is refused", f"folder:{tmp_path}")

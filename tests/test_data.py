"""Data sets: the data set itself, the bundled one, the specifications and the idx files."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mohs.data import Dataset, available, load
from mohs.errors import DataError

SHARED = Path(os.environ.get("MOHS_SHARED", Path(__file__).resolve().parents[2] / "shared"))
FASHION_HASH = "5f4ed5affcbf9669a9d13c469d627f9944793409116fcf09e313cacc91930cae"


def idx_bytes(array: np.ndarray, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def images(n: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 5, 6), dtype=np.uint8)


def write_idx(folder: Path, x: bytes | np.ndarray, y: bytes | np.ndarray, stem: str = "t10k", end: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for what, dims, part in (("images", 3, x), ("labels", 1, y)):
        data = idx_bytes(part) if isinstance(part, np.ndarray) else part
        path = folder / f"{stem}-{what}-idx{dims}-ubyte{end}"
        path.write_bytes(gzip.compress(data) if end else data)
    return folder


def refused(match: str, spec: str, **options: Any) -> None:
    with pytest.raises(DataError, match=match):
        load(spec, **options)


# --- the bundled set ------------------------------------------------------------------------------


def test_bundled_is_the_first_thousand_test_images() -> None:
    data = load("bundled:fashion-mnist")
    assert data.x.shape == (1000, 1, 28, 28)
    assert data.x.dtype == torch.float32
    assert data.y.dtype == torch.int64
    assert data.y[:8].tolist() == [9, 2, 1, 1, 6, 1, 4, 6]  # as published
    assert float(data.x.min()) == 0.0
    assert float(data.x.max()) == 1.0
    assert data.classes[9] == "Ankle boot"
    assert data.name == "bundled:fashion-mnist"
    assert data.hash == FASHION_HASH


def test_bundled_equals_the_original_files() -> None:
    folder = Path("/usr/share/datasets/fashion-mnist")
    if not folder.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    original, bundled = load(f"idx:{folder}", n=1000), load("bundled:fashion-mnist")
    assert torch.equal(original.x, bundled.x)
    assert torch.equal(original.y, bundled.y)


def test_bundle_is_small_and_carries_its_licence() -> None:
    import mohs.data.loading as loading

    size = sum(p.stat().st_size for p in (loading.BUNDLED / "fashion-mnist").iterdir())
    assert size < 450_000
    assert "Zalando SE" in (loading.BUNDLED / "LICENSE.fashion-mnist").read_text()


def test_mnist_from_outside() -> None:
    if not (SHARED / "data" / "mnist").is_dir():
        pytest.skip("no MNIST beside the repository (MOHS_SHARED)")
    data = load(f"idx:{SHARED / 'data' / 'mnist'}", n=5)
    assert data.y.tolist() == [7, 2, 1, 0, 4]
    assert data.classes == tuple("0123456789")


# --- Dataset --------------------------------------------------------------------------------------


def small() -> Dataset:
    return Dataset(torch.rand(6, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2]))


def test_unpacks_and_counts() -> None:
    x, y = small()
    assert len(small()) == len(x) == len(y) == 6


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(6)))
def test_ids_belong_to_examples_not_to_positions(order: list[int]) -> None:
    data = small()
    part = data.take(indices=order)
    assert part.ids == [data.ids[k] for k in order]
    assert (part.hash == data.hash) == (order == sorted(order))


def test_ids_see_shape_and_hash_sees_labels() -> None:
    x, y = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    flat, square = Dataset(x, y), Dataset(x.reshape(1, 1, 2, 2), y)
    assert flat.ids != square.ids
    relabelled = Dataset(x, y + 1)
    assert relabelled.ids == flat.ids
    assert relabelled.hash != flat.hash


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.integers(1, 6))
def test_take_is_a_slice(start: int, n: int) -> None:
    data = small()
    if start + n > 6:
        with pytest.raises(DataError, match="asked the data set for"):
            data.take(n, start)
    else:
        assert torch.equal(data.take(n, start).x, data.x[start : start + n])
        assert data.take(n, start).classes == data.classes


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"n": 0}, "1 to 6"),
        ({"n": -1}, "1 to 6"),
        ({"start": 6}, "0 to 5"),
        ({"start": -1}, "0 to 5"),
        ({"indices": []}, "non-empty"),
        ({"indices": [0, 6, -1]}, "rows 6 and -1"),
        ({"indices": [0.5]}, "whole numbers"),
        ({"indices": torch.tensor([True] * 6)}, "nonzero"),
        ({"indices": [0], "n": 1}, "one or the other"),
    ],
)
def test_take_refuses(arguments: dict, match: str) -> None:
    with pytest.raises(DataError, match=match):
        small().take(**arguments)


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (torch.rand(2, 3).half(), torch.tensor([0, 1]), "float32 or float64"),
        (np.zeros((2, 3)), torch.tensor([0, 1]), "ndarray"),
        (torch.rand(2, 3), torch.tensor([0, 1], dtype=torch.int32), "int64"),
        (torch.rand(2), torch.tensor([0, 1]), "at least two-dimensional"),
        (torch.rand(2, 3), torch.tensor([[0], [1]]), "argmax"),
        (torch.rand(2, 3), torch.tensor([0]), "2 inputs but 1 labels"),
        (torch.rand(0, 3), torch.zeros(0, dtype=torch.int64), "no data"),
        (torch.rand(2, 3), torch.tensor([0, -1]), "negative labels in row 1"),
        (torch.rand(2, 3), torch.tensor([0, 5]), "out of range in row 1"),
        (torch.tensor([[0.0], [float("nan")]]), torch.tensor([0, 1]), "NaN or infinite inputs in row 1"),
    ],
)
def test_dataset_refuses(x: torch.Tensor, y: torch.Tensor, match: str) -> None:
    with pytest.raises(DataError, match=match):
        Dataset(x, y, ("a", "b"))


def test_huge_label_does_not_fill_the_memory_with_class_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="below 1,000,000"):
        Dataset(torch.rand(1, 2), torch.tensor([10**15]))
    np.savez(tmp_path / "d.npz", x=np.zeros((1, 2), np.float32), y=[10**15])
    refused("below 1,000,000", f"npz:{tmp_path / 'd.npz'}")


# --- specifications -------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["mnist", "", "idx:", "http://somewhere", "bundledfashion-mnist", 3, None])
def test_unknown_spec_lists_the_allowed_ones(spec: object) -> None:
    with pytest.raises(DataError, match="npz:FILE") as error:
        load(spec)  # type: ignore[arg-type]
    assert all(form in str(error.value) for form, _ in available())


def test_other_wrong_questions(tmp_path: Path) -> None:
    refused("allowed is bundled:fashion-mnist", "bundled:cifar10")
    refused("test images only", "bundled:fashion-mnist", split="train")
    refused("'test' and 'train'", "bundled:fashion-mnist", split="val")
    refused("at least 1", "bundled:fashion-mnist", n=0)
    refused("it holds 1000", "bundled:fashion-mnist", n=1001)
    for scheme in ("idx", "cifar10", "npz", "folder"):
        refused("there is no", f"{scheme}:{tmp_path / 'nowhere'}")
    (tmp_path / "file").write_text("x")
    for scheme in ("idx", "cifar10", "folder"):
        refused("not a directory", f"{scheme}:{tmp_path / 'file'}")
    refused("not a file", f"npz:{tmp_path}")


# --- idx ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("place", ["", "MNIST/raw"])
def test_idx_round_trip(tmp_path: Path, end: str, place: str) -> None:
    x, y = images(), np.array([0, 3, 1, 1], np.uint8)
    write_idx(tmp_path / place, x, y, end=end)
    write_idx(tmp_path / place, x[::-1], y[::-1], stem="train", end=end)
    data = load(f"idx:{tmp_path}")
    assert torch.equal(data.x, torch.from_numpy(x).float().div(255)[:, None])
    assert data.y.tolist() == [0, 3, 1, 1]
    assert data.classes == ("0", "1", "2", "3")
    assert torch.equal(load(f"idx:{tmp_path}", split="train").x, data.x.flip(0))
    assert len(load(f"idx:{tmp_path}", n=2)) == 2
    assert load(f"idx:{tmp_path}", n=2).classes == data.classes  # of the whole source


def test_idx_with_channels(tmp_path: Path) -> None:
    x = np.arange(2 * 3 * 2 * 2, dtype=np.uint8).reshape(2, 3, 2, 2)
    write_idx(tmp_path, x, np.zeros(2, np.uint8))
    assert load(f"idx:{tmp_path}").x.shape == (2, 3, 2, 2)


GOOD_X, GOOD_Y = idx_bytes(images()), idx_bytes(np.zeros(4, np.uint8))


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (b"", GOOD_Y, "not an idx file"),
        (b"<!DOCTYPE html>", GOOD_Y, "web page"),
        (idx_bytes(images(), kind=0x0D), GOOD_Y, "type 0x0d"),
        (GOOD_Y, GOOD_X, "swapped"),
        (GOOD_X[:9], GOOD_Y, "inside its header"),
        (GOOD_X[:-1], GOOD_Y, "declares 120 bytes \\(4 x 5 x 6\\) but holds 119"),
        (GOOD_X + b"\0", GOOD_Y, "holds more"),
        (bytes([0, 0, 8, 3]) + struct.pack(">3I", *[2**31] * 3), GOOD_Y, "that are read at once"),
        (GOOD_X, idx_bytes(np.zeros(3, np.uint8)), "4 inputs but 3 labels"),
        (idx_bytes(images(0)), idx_bytes(np.zeros(0, np.uint8)), "no examples"),
    ],
)
@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx_refuses(tmp_path: Path, x: bytes, y: bytes, match: str, end: str) -> None:
    refused(match, f"idx:{write_idx(tmp_path, x, y, end=end)}")


def test_idx_missing_and_damaged_gzip(tmp_path: Path) -> None:
    refused("no images for split 'test'", f"idx:{tmp_path}")
    write_idx(tmp_path, images(), np.zeros(4, np.uint8), end=".gz")
    refused("no images for split 'train'", f"idx:{tmp_path}", split="train")
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    refused("gzip data is damaged", f"idx:{tmp_path}")
    path.write_bytes(whole[:30] + bytes([whole[30] ^ 0xFF]) + whole[31:])
    refused("gzip data is damaged|declares", f"idx:{tmp_path}")


def test_idx_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    bomb = idx_bytes(images()) + bytes(50_000_000)
    refused("holds more", f"idx:{write_idx(tmp_path, bomb, GOOD_Y, end='.gz')}")


def test_dataset_takes_any_shape_and_both_precisions() -> None:
    x, y = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0])
    single, double = Dataset(x, y), Dataset(x.double(), y)
    assert not set(single.ids) & set(double.ids)
    assert single.hash != double.hash
    assert double.take(1).x.dtype == torch.float64
    # every bit counts: a change too small for float32 is another example
    assert Dataset(x.double() + 1e-12, y).ids[0] != double.ids[0]

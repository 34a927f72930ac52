"""Bad input on the command line: each ends with exit code 2, a message that helps, no traceback, and an untouched --out."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_problem import DATA, ROOT, Shop, in_order, shop

from mohs import models

__all__ = ["shop"]

FASHION = ROOT / "mohs" / "data" / "bundled" / "fashion-mnist"


# ---- data ------------------------------------------------------------------------------------------------


def test_missing_file(shop: Shop) -> None:
    said = shop.refused("run", "linear", "npz:nowhere.npz", *shop.how())
    assert in_order(said, "npz:nowhere.npz: there is no nowhere.npz", "Check the path", str(shop.folder))


def test_unknown_form_of_data(shop: Shop) -> None:
    said = shop.refused("run", "linear", "csv:numbers.csv", *shop.how())
    assert in_order(said, "no data set 'csv:numbers.csv'", "allowed are", "idx:DIR", "npz:FILE")


def test_two_values_for_an_option_that_takes_one(shop: Shop) -> None:
    code, _, said = shop.do("run", *shop.model, *shop.how(), "--defense", "bit-depth:3", "jpeg:75")
    assert code == 2
    assert not shop.out.exists()
    assert in_order(said, "jpeg:75", "one value each time", "--defense bit-depth:3 --defense jpeg:75", "--help")


def test_truncated_idx(shop: Shop) -> None:
    folder = shop.folder / "idx"
    folder.mkdir()
    for path in FASHION.iterdir():
        content = gzip.decompress(path.read_bytes())
        name = path.name.removesuffix(".gz")
        (folder / name).write_bytes(content[: len(content) // 2] if "images" in name else content)
    said = shop.refused("run", "linear", f"idx:{folder}", *shop.how())
    assert "t10k-images" in said
    assert any(word in said for word in ("cut", "truncated", "short"))


def test_more_examples_than_there_are(shop: Shop) -> None:
    said = shop.refused("run", *shop.model[:-1], "2000", *shop.how())
    assert in_order(said, "asked for 2000 examples", "it holds 1000", "Ask for at most that many")


def npz(shop: Shop, x: np.ndarray, y: np.ndarray) -> str:
    np.savez(shop.folder / "own.npz", x=x, y=y)
    return f"npz:{shop.folder / 'own.npz'}"


def grey(rows: int = 8) -> np.ndarray:
    return np.random.default_rng(0).random((rows, 1, 28, 28), dtype=np.float32)


def test_nan_inputs(shop: Shop) -> None:
    x = grey()
    x[[2, 5], 0, 3, 3] = np.nan
    said = shop.refused("run", "linear", npz(shop, x, np.arange(8)), *shop.how())
    assert in_order(said, "NaN", "rows 2 and 5", "remove or repair")


def test_inputs_beyond_one(shop: Shop) -> None:
    x = grey()
    x[3] *= 255
    said = shop.refused("run", "linear", npz(shop, x, np.arange(8)), *shop.how())
    assert in_order(said, "must lie in [0, 1]", "row 3", "Divide by 255")


def test_inputs_outside_the_box_of_the_threat(shop: Shop) -> None:
    said = shop.refused("run", *shop.model, *shop.how(threat="linf:0.02 in [0.2, 0.8]"))
    assert in_order(said, "Inputs must lie in the box [0.2, 0.8]", "rows 0, 1, 2", "range over [0, 1]", "state the box")


def test_labels_beyond_the_classes_of_the_model(shop: Shop) -> None:
    y = np.arange(8)
    y[[1, 6]] = 10, 11
    said = shop.refused("run", "linear", npz(shop, grey(), y), *shop.how())
    assert in_order(
        said, "The model has 10 classes, but labels reach 11 (rows 1 and 6)", "Allowed: 0 to 9", "Check that"
    )


def test_negative_labels(shop: Shop) -> None:
    said = shop.refused("run", "linear", npz(shop, grey(), np.arange(8) - 1), *shop.how())
    assert in_order(said, "negative", "row 0", "count from 0")


def test_labels_and_inputs_of_other_lengths(shop: Shop) -> None:
    assert in_order(
        shop.refused("run", "linear", npz(shop, grey(), np.arange(7)), *shop.how()), "8 inputs but 7 labels"
    )


def test_inputs_of_another_shape_than_the_model_takes(shop: Shop) -> None:
    said = shop.refused("run", "linear", npz(shop, grey()[..., :14], np.arange(8)), *shop.how())
    assert in_order(
        said, "The model raised RuntimeError", "(8, 1, 28, 14)", "Check that model and data belong together"
    )


# ---- models ----------------------------------------------------------------------------------------------


def test_web_page_saved_as_weights(shop: Shop) -> None:
    for name in ("w.safetensors", "w.pt"):
        (shop.folder / name).write_text("<!DOCTYPE html><html><body>404: Not Found</body></html>")
        said = shop.refused("run", "linear", DATA, "--weights", shop.folder / name, *shop.how())
        assert in_order(said, name, "looks like an HTML page", "download failed", "Fetch the file again")


def test_weights_that_do_not_fit(shop: Shop) -> None:
    models.save_weights(models.linear(k=7), shop.folder / "seven.safetensors")
    said = shop.refused("run", "linear", DATA, "--weights", shop.folder / "seven.safetensors", *shop.how())
    assert in_order(said, "weights and net do not fit", "[7, 784] in the file, [10, 784] in the net", "architecture?")


def test_truncated_weights(shop: Shop) -> None:
    whole = shop.weights.read_bytes()
    shop.weights.write_bytes(whole[: len(whole) // 2])
    assert "damaged or no safetensors file" in shop.refused("run", *shop.model, *shop.how())


def test_missing_weights(shop: Shop) -> None:
    shop.weights.unlink()
    assert "linear.safetensors does not exist. Check the path" in shop.refused("run", *shop.model, *shop.how())


def test_no_weights_file_is_ever_executed(shop: Shop) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(shop.folder / "pwned"),)

    torch.save({"weight": Evil()}, shop.folder / "evil.pt")
    said = shop.refused("run", "linear", DATA, "--weights", shop.folder / "evil.pt", *shop.how())
    assert in_order(said, "refused, it needs more than plain tensors", "never opened")
    assert not (shop.folder / "pwned").exists()


def test_unknown_model(shop: Shop) -> None:
    said = shop.refused("run", "resnet9000", DATA, *shop.how())
    assert in_order(said, "no model 'resnet9000'", "allowed are bundled:NAME", "small_cnn", "FILE.onnx")


FACTORY = """
import torch
from torch import nn
class Odd(nn.Module):
    def __init__(self, fault):
        super().__init__()
        self.net, self.fault = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), fault
    def forward(self, x):
        z = self.net(x)
        if self.fault == "raises":
            raise KeyError("layer 3")
        return z[:, :, None] if self.fault == "shape" else (z, z) if self.fault == "pair" else z
def shape(): return Odd("shape")
def pair(): return Odd("pair")
def raises(): return Odd("raises")
def fails(): raise FileNotFoundError("my weights")
def text(): return "a model"
"""


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("shape", ("answered with shape (8, 10, 1) to 8 inputs", "Allowed: [N, K] logits", "Flatten or wrap")),
        ("pair", ("answered with a tuple", "Mohs needs", "Wrap the model")),
        ("raises", ("The model raised KeyError", "layer 3", "Check that")),
        ("fails", ("odd_models:fails", "fails() raised FileNotFoundError: my weights", "without arguments")),
        ("text", ("text() returned a str", "it must return an nn.Module")),
        ("absent", ("odd_models has no absent", "Check the name after the colon")),
    ],
)
def test_faulty_factory(name: str, parts: tuple[str, ...], shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    (shop.folder / "odd_models.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(shop.folder)
    assert in_order(shop.refused("run", f"odd_models:{name}", DATA, "--n", 9, *shop.how()), *parts)


def test_module_that_cannot_be_imported(shop: Shop) -> None:
    (shop.folder / "broken_module.py").write_text("import no_such_package_anywhere\n")
    said = shop.refused("run", "broken_module:make", DATA, *shop.how())
    assert in_order(said, "importing broken_module failed", "no_such_package_anywhere", "Install it, or start where")


# ---- threats, plans, claims ------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "check", "certify"])
def test_unknown_threat(command: str, shop: Shop) -> None:
    how = shop.how()[2:] if command == "run" else []
    for text in ("linfinity:0.1", "linf", "linf:a", "linf:-1"):
        said = shop.refused(command, *shop.model, *how, "--threat", text)
        assert "linf:8/255" in said or "radius" in said
        assert text in said or text.partition(":")[2] in said


def test_infinite_radius(shop: Shop) -> None:
    said = shop.refused("run", *shop.model, *shop.how(threat="l2:inf"))
    assert in_order(said, "needs a finite radius; got l2:inf", "Use mohs.attack with a minimum-norm attack")


def test_unknown_plan(shop: Shop) -> None:
    said = shop.refused("run", *shop.model, *shop.how(plan="brutal"))
    assert in_order(
        said, "no plan 'brutal'", "Allowed: autoattack, quick, standard, thorough, or the path of a .toml file"
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('[[attack]]\nuse = "PDG"', ("attack 1 of 1", "no attack 'PDG'", "Allowed: ", "PGD")),
        ('[[attack]]\nuse = "PGD"\nwith = { step = 3 }', ("has no 'step'", "Allowed: steps")),
        ("[[attack]\nuse", ("is not valid TOML",)),
        ('name = "empty"', ("has no attack", "[[attack]]")),
    ],
)
def test_faulty_plan(text: str, parts: tuple[str, ...], shop: Shop) -> None:
    shop.plan.write_text(text)
    assert in_order(shop.refused("run", *shop.model, *shop.how()), str(shop.plan.name), *parts)


@pytest.mark.parametrize(
    ("claim", "why"),
    [
        ("very robust", "names no number"),
        ("accuracy >= 60", "Was 60% meant?"),
        ("accuracy > 0.6", "write '>='"),
        ("accuracy >= 0", "At least 0 is always true"),
    ],
)
def test_claim_that_cannot_be_tested(claim: str, why: str, shop: Shop) -> None:
    said = shop.refused("run", *shop.model, *shop.how(), "--claim", claim)
    assert why in said
    assert "Allowed: 'accuracy >= 0.6'" in said


def test_unknown_certificate(shop: Shop) -> None:
    assert "no certificate 'magic'. Allowed: ibp, crown" in shop.refused(
        "run", *shop.model, *shop.how(), "--certify", "magic"
    )


def test_certificate_that_does_not_cover_the_threat(shop: Shop) -> None:
    said = shop.refused("run", *shop.model, *shop.how(threat="l0:3"), "--certify", "ibp")
    assert in_order(said, "IBP covers balls of a norm; got the threat l0:3", "Allowed: linf, l2, l1")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--n", "0", "ask for at least 1"),
        ("--batch", "-1", "batch must be a whole number >= 1; got -1"),
        ("--stated-accuracy", "93.5", "Write 93.5% as 0.935"),
    ],
)
def test_number_out_of_range(option: str, value: str, said: str, shop: Shop) -> None:
    model = shop.model[:-2] if option == "--n" else shop.model
    how = shop.how(batch=value) if option == "--batch" else [*shop.how(), option, value]
    assert said in shop.refused("run", *model, *how)


# ---- the directory ---------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_out_of_another_run(shop: Shop) -> None:
    shop.run("--claim", "accuracy >= 0.1")
    before = content(shop.out)
    code, _, err = shop.run("--seed", "3")
    assert code == 2
    assert in_order(err, f"{shop.out} holds another run (seed: 0 there, 3 here)", "Choose another --out, or repeat")
    assert content(shop.out) == before


def test_out_with_other_files(shop: Shop) -> None:
    shop.out.mkdir()
    (shop.out / "thesis.tex").write_text("years of work")
    code, _, err = shop.run()
    assert code == 2
    assert in_order(err, "is not empty and holds no record (found: thesis.tex)", "Nothing was changed", "new directory")
    assert content(shop.out) == {"thesis.tex": b"years of work"}


def test_out_that_is_a_file(shop: Shop) -> None:
    shop.out.write_text("mine")
    code, _, err = shop.run()
    assert code == 2
    assert in_order(err, "--out must be a directory", "is a file", "Choose another --out")
    assert shop.out.read_text() == "mine"


def test_out_that_cannot_be_made(shop: Shop) -> None:
    for place in ("/proc/mohs-run", "/sys/mohs-run"):
        if not Path(place).parent.is_dir():
            pytest.skip(f"no {Path(place).parent} here")
        code, _, err = shop.do("run", *shop.model, *shop.how(out=place))
        assert code == 2
        assert in_order(err, "cannot create the run directory", place, "choose another --out")
        assert "Traceback" not in err
    (shop.folder / "file").write_text("")
    code, _, err = shop.do("run", *shop.model, *shop.how(out=shop.folder / "file" / "run"))
    assert code == 2
    assert in_order(err, "cannot", "Not a directory", "choose another --out")


def test_out_that_is_read_only(shop: Shop) -> None:
    shop.out.mkdir()
    shop.out.chmod(0o500)
    try:
        if os.access(shop.out, os.W_OK):
            pytest.skip("this user may write everywhere, whatever the permissions")
        code, _, err = shop.run()
        assert code == 2
        assert in_order(err, "is not accessible", "Change its permissions or choose another --out")
        assert content(shop.out) == {}
    finally:
        shop.out.chmod(0o700)


@pytest.mark.parametrize("command", ["report", "replay", "diff"])
def test_directory_without_a_record(command: str, shop: Shop) -> None:
    shop.out.mkdir()
    code, _, err = shop.do(command, shop.out, *([shop.out] if command == "diff" else []))
    assert code == 2
    assert in_order(
        err, "a record was asked for, but there is no", "record.json", "Give the directory an evaluation wrote"
    )
    assert content(shop.out) == {}


def test_damaged_record(shop: Shop) -> None:
    shop.run()
    header, rows = shop.out / "record.json", shop.out / "ledger.sqlite"
    whole = header.read_bytes()
    header.write_bytes(whole[:200])
    for argv in (["report", shop.out], ["replay", shop.out], ["run", *shop.model, *shop.how()]):
        code, _, err = shop.do(*argv)
        assert code == 2
        assert in_order(err, "record.json is damaged or cut short", "Restore it from a copy")
    header.write_bytes(whole)
    rows.write_bytes(struct.pack("<q", 7) * 2000)
    code, _, err = shop.do("replay", shop.out)
    assert code == 2
    assert "ledger.sqlite" in err
    assert "Traceback" not in err


def test_replay_of_a_model_that_has_gone(shop: Shop) -> None:
    shop.run()
    shop.weights.unlink()
    code, _, err = shop.do("replay", shop.out)
    assert code == 2
    assert "linear.safetensors does not exist" in err

"""The short form of defenses, and what it says where it cannot be read."""

from __future__ import annotations

import pytest

from mohs import defenses
from mohs.defenses import REGISTRY, Stack, parse
from mohs.errors import UsageError

READ = {
    "jpeg": defenses.JPEG(75),
    "jpeg:30": defenses.JPEG(30),
    "jpeg:quality=30": defenses.JPEG(30),
    "noise-input:8/255": defenses.NoiseInput(8 / 255),
    " gaussian-blur : 1e-1 ": defenses.GaussianBlur(0.1),
    "random-resize-pad:1:1.2:32": defenses.RandomResizePad(1.0, 1.2, 32),
    "random-resize-pad:0.9:size=none": defenses.RandomResizePad(0.9),
    "total-variation:rounds=2:keep=0.7": defenses.TotalVariation(0.7, rounds=2),
    "logit-rounding:-1": defenses.LogitRounding(-1),
    "majority-vote": defenses.MajorityVote(),
    "pixel-defend:8/255": defenses.PixelDefend(8 / 255),
    "defense-gan:200:10:seed=1": defenses.DefenseGAN(200, 10, seed=1),
}


@pytest.mark.parametrize("text", READ)
def test_what_is_read(text: str) -> None:
    assert parse(text) == READ[text]


def test_several_are_a_stack_in_their_order() -> None:
    expected = Stack(defenses.BitDepth(4), defenses.JPEG(60), defenses.NoiseInput(0.1))
    assert parse("bit-depth:4,jpeg:60, noise-input:0.1") == expected
    assert parse(["bit-depth:4", "jpeg:60,noise-input:0.1"]) == expected
    assert parse(["jpeg"]) == defenses.JPEG()


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_name_is_read_or_says_why_not(name: str) -> None:
    if name in ("quilting", "defensive-perturbation"):
        with pytest.raises(UsageError, match=rf"The defense '{name}' needs (bank|delta), which no text can give"):
            parse(name)
    else:
        assert type(parse(name)) is REGISTRY[name]


REFUSED = {
    "": "a name is missing",
    "jpeg,,jpeg": "a name is missing",
    "jpg:75": r"no defense 'jpg'\. Did you mean 'jpeg'\? Known: activation-pruning, ",
    "something": r"no defense 'something'\. Known:",
    "jpeg:75:3": r"too many values\. Its form: jpeg\[:quality=75\]",
    "jpeg:high": "quality must be a whole number; got 'high'",
    "jpeg:7.5": "quality must be a whole number; got '7.5'",
    "jpeg:": "quality must be a whole number; got ''",
    "noise-input:1/0": "sigma must be a number, such as 0.1 or 8/255; got '1/0'",
    "jpeg:size=3": r"has no setting 'size'\. Its form",
    "crop-ensemble:share=0.5:3": "a value without a name follows a named one",
    "jpeg:75:quality=3": "gives quality twice",
    "jpeg:0": "The defense 'jpeg:0' cannot be: quality must be a whole number at least 1 and at most 100; got 0",
    "noise-input:nan": "sigma must be a number above 0; got nan",
    "detach:1": r"too many values\. Its form: detach",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=REFUSED[text]):
        parse(text)

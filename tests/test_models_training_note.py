"""What a net was trained against is read from its weights file, whichever way the file is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from mohs import models
from mohs.models.weights import save_weights


@pytest.mark.parametrize("factory", [True, False])
def test_what_a_net_was_trained_against_comes_with_its_weights(factory: bool, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_weights(models.load("small_cnn"), path, {"arch": "small_cnn", "against": "PGD(steps=7)"})
    net = models.load("small_cnn", weights=path) if factory else models.load(str(path))
    assert net.trained_against == "PGD(steps=7)"
    assert not hasattr(models.load("small_cnn"), "trained_against")

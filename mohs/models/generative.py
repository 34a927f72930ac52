"""Nets that ship with Mohs and are no classifiers: a density and a generator, which defenses are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from mohs.errors import ModelError
from mohs.models.generator import Generator
from mohs.models.loading import BUNDLED, bundled_info
from mohs.models.pixelcnn import PixelCNN
from mohs.models.weights import check_file, fit, read_weights, save_weights, write_atomically

FOLDER = BUNDLED / "generative"
KINDS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType({"pixelcnn": PixelCNN, "generator": Generator})


def load_generative(name: str, *, folder: Path | None = None) -> nn.Module:
    """A bundled density or generator, in eval mode, on the CPU, its weights without gradients.

    Args:
        name: ``fashion-pixelcnn`` or ``fashion-generator``.
        folder: where its weights and its sidecar lie; the package's own by default.

    Raises:
        ModelError: there is no such net, or its file was changed.
    """
    folder = folder or FOLDER
    info = bundled_info(name, folder=folder)
    path = check_file(folder / f"{name}.safetensors")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != info["sha256"] or info["arch"] not in KINDS:
        raise ModelError(
            f"{name}: {path} has SHA-256 {digest} and architecture {info['arch']!r}; its description says {info['sha256']}, "
            f"and known are {', '.join(KINDS)}. The files were changed; install Mohs again."
        )
    with torch.random.fork_rng(devices=[]):  # the first weights are drawn, and this may happen within a run
        net = KINDS[info["arch"]](**info.get("settings", {}))
    fit(net, read_weights(path), name)
    return net.eval().requires_grad_(False)


def save_generative(
    net: nn.Module, name: str, *, arch: str, settings: Mapping[str, int], recipe: str, numbers: Mapping[str, Any],
    folder: Path | None = None,
) -> Path:  # fmt: skip
    """Write weights, as float16, and the sidecar of a density or generator that ships with Mohs.

    Args:
        net: the trained net.
        name: of its files.
        arch: which of ``KINDS`` it is.
        settings: what it is made with, where that is not the default.
        recipe: one line: what made it.
        numbers: measured figures, of the weights after they were rounded to float16.
        folder: where to; the package's own by default.

    Returns:
        The path of the weights.

    Raises:
        ModelError: the architecture is unknown, or the weights do not belong to it.
    """
    if arch not in KINDS:
        raise ModelError(f"no generative net {arch!r}; allowed are {', '.join(KINDS)}.")
    copy = KINDS[arch](**settings)
    fit(copy, net.state_dict(), name)
    path = (folder or FOLDER) / f"{name}.safetensors"
    save_weights(copy.half(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    info = {"arch": arch, "settings": dict(settings), "recipe": recipe, "sha256": digest, "numbers": dict(numbers)}
    write_atomically((json.dumps(info, indent=2) + "\n").encode(), path.with_suffix(".json"))
    return path


def bundled_digest(name: str) -> str:
    """SHA-256 (hex) of a bundled net's file, as its sidecar says: what a record names it by."""
    return str(bundled_info(name, folder=FOLDER)["sha256"])

"""From a short specification (``bundled:NAME``, ``package.module:factory``, ``FILE.onnx`` ...) to a module."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mohs.errors import ModelError
from mohs.models._pt2 import Exported, load_pt2
from mohs.models.nets import NETS
from mohs.models.served import Served
from mohs.models.weights import (
    SUFFIXES,
    check_file,
    fit,
    read_metadata,
    read_with_notes,
    save_weights,
    write_atomically,
)

BUNDLED = Path(__file__).parent / "bundled"
_FORMS = (
    ("package.module:factory", "what the function returns, with --weights FILE (.safetensors, .pt or .pth)"),
    ("FILE.safetensors", "weights alone; the net is named by the file itself or by arch"),
    ("FILE.pt2", "a program saved by torch.export, with a free batch dimension"),
    ("FILE.onnx", "an ONNX net, converted and compared with onnxruntime (needs the onnx extra)"),
    (
        "http://HOST/v1/models/NAME:predict",
        "behind TensorFlow Serving or KServe V1, https as well (needs the http extra)",
    ),
    ("http://HOST/v2/models/NAME/infer", "behind Triton, MLServer, TorchServe, OpenVINO: the Open Inference Protocol"),
)
_log = logging.getLogger(__name__)


def available() -> list[tuple[str, str]]:
    """What ``load`` understands: bundled nets, reference nets and forms, each with a line of description."""
    listed = [(f"bundled:{name}", str(bundled_info(name).get("recipe", ""))) for name in _bundled_names()]
    for name, factory in NETS.items():
        listed.append((name, f"{(factory.__doc__ or '').splitlines()[0]} Random weights unless some are given."))
    return listed + list(_FORMS)


def load(spec: str, *, weights: str | Path | None = None, arch: str | None = None) -> nn.Module:
    """Load a classifier by its short specification, in eval mode, on the CPU.

    Args:
        spec: ``bundled:NAME``; ``package.module:factory`` (called without arguments; the working directory is searched
            last); the name of a reference net; a weights file; ``FILE.pt2``; ``FILE.onnx``; the URL of a server that
            answers probabilities (for other answers, and for headers, see ``Served``).
        weights: Weights for a factory or a reference net; without them it is taken as it is made.
        arch: For a weights file only: the reference net or ``package.module:factory`` they belong to.

    Returns:
        The module. What had to be adapted to load it is told by ``loading_notes``.

    Raises:
        ModelError: Nothing is there; it is damaged, unsafe to open or does not fit; a factory raises or returns
            something else than a module.

    >>> load("small_cnn").training
    False
    """
    if not isinstance(spec, str) or not spec:
        raise ModelError(f"no model {spec!r}; allowed are {_allowed()}.")
    if is_url(spec):
        if weights is not None or arch is not None:
            raise ModelError(
                "A served model brings its own weights and net, so weights and arch cannot be used; leave them out."
            )
        return Served(spec)
    suffix = Path(spec).suffix.lower()
    takes_weights = not spec.startswith("bundled:") and suffix not in (".pt2", ".onnx", *SUFFIXES)
    if weights is not None and not takes_weights:
        raise ModelError(f"{spec} brings its own weights, so weights={str(weights)!r} cannot be used; leave it out.")
    if arch is not None and suffix not in SUFFIXES:
        raise ModelError(f"arch={arch!r} names the net of a weights file; {spec} is none. Leave it out.")
    notes: list[str] = []
    if spec.startswith("bundled:"):
        module = _load_bundled(spec.removeprefix("bundled:"))
    elif suffix == ".pt2":
        module = load_pt2(check_file(spec))
    elif suffix == ".onnx":
        from mohs.models._onnx import load_onnx

        module, notes = load_onnx(check_file(spec))
    elif suffix in SUFFIXES:
        path = check_file(spec)
        facts = read_metadata(path) if suffix == ".safetensors" else {}
        stored = facts.get("arch")
        if arch is None and not isinstance(stored, str):
            raise ModelError(f"{path} holds weights only; say which net they belong to with arch, one of {_nets()}.")
        module = _build(arch or str(stored))
        notes = _fill(module, path)
    else:
        module = _build(spec)
        if weights is not None:
            notes = _fill(module, Path(weights))
    return _finish(module, notes, spec)


def is_url(spec: str) -> bool:
    """Does a specification name a served model?

    >>> is_url("https://host/v2/models/net/infer"), is_url("package.module:factory")
    (True, False)
    """
    return spec.lower().startswith(("http://", "https://"))


def loading_notes(module: nn.Module) -> tuple[str, ...]:
    """What ``load`` had to adapt: a prefix dropped, weights unwrapped or converted. Empty when nothing was."""
    return tuple(module.__dict__.get("_loading_notes", ()))


def _finish(module: nn.Module, notes: list[str], spec: str) -> nn.Module:
    try:
        module = module.eval()
    except NotImplementedError:
        # the modules that torch.export makes refuse eval(); their mode was fixed when they were exported
        module = Exported(module)
    module.__dict__["_loading_notes"] = tuple(notes)
    for note in notes:
        _log.info("%s: %s", spec, note)
    return module


def _fill(module: nn.Module, path: Path) -> list[str]:
    state, notes = read_with_notes(path)
    notes = notes + fit(module, state, str(path))
    if path.suffix.lower() == ".safetensors":
        _note_training(module, read_metadata(path))
    return notes


def _build(spec: str) -> nn.Module:
    """A reference net by name, or what ``package.module:factory`` makes."""
    if spec in NETS:
        return NETS[spec]()
    package, colon, attribute = spec.partition(":")
    if not colon or not package or not attribute or "/" in package:
        raise ModelError(f"no model {spec!r}; allowed are {_allowed()}.")
    with _working_directory_last():
        try:
            found: Any = importlib.import_module(package)
        except (Exception, SystemExit) as error:
            raise ModelError(
                f"{spec}: importing {package} failed ({type(error).__name__}: {error}). "
                "Install it, or start where it can be imported."
            ) from error
        try:
            for part in attribute.split("."):
                found = getattr(found, part)
        except AttributeError:
            raise ModelError(f"{spec}: {package} has no {attribute}. Check the name after the colon.") from None
        if not isinstance(found, nn.Module):
            if not callable(found):
                raise ModelError(
                    f"{spec}: {attribute} is a {type(found).__name__}; allowed are a function that returns an "
                    "nn.Module, or an nn.Module."
                )
            try:
                found = found()
            except (Exception, SystemExit) as error:
                raise ModelError(
                    f"{spec}: {attribute}() raised {type(error).__name__}: {error}. It is called without arguments."
                ) from error
    if not isinstance(found, nn.Module):
        raise ModelError(f"{spec}: {attribute}() returned a {type(found).__name__}; it must return an nn.Module.")
    return found


@contextlib.contextmanager
def _working_directory_last() -> Iterator[None]:
    """Let a factory beside the user's command be found, without letting it hide an installed package."""
    here = str(Path.cwd())
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def _bundled_names(folder: Path | None = None) -> list[str]:
    return sorted(p.stem for p in (folder or BUNDLED).glob("*.json"))


def bundled_info(name: str, *, folder: Path | None = None) -> dict[str, Any]:
    """The sidecar of a bundled net: its architecture, recipe, SHA-256 and measured numbers.

    Raises:
        ModelError: There is no such net, or its sidecar is damaged.
    """
    if name not in _bundled_names(folder):
        have = ", ".join(f"bundled:{n}" for n in _bundled_names(folder)) or "none yet"
        raise ModelError(f"no bundled model {name!r}; there are {have}.")
    try:
        info = json.loads(((folder or BUNDLED) / f"{name}.json").read_text("utf-8"))
        if not isinstance(info, dict) or not isinstance(info["arch"], str) or not isinstance(info["sha256"], str):
            raise ValueError("arch and sha256 must be texts")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"bundled:{name}: its description is damaged ({error!r}). Install Mohs again.") from error
    return info


def save_bundled(
    module: nn.Module, name: str, *, arch: str, recipe: str, numbers: Mapping[str, Any], folder: Path | None = None
) -> Path:
    """Write weights and sidecar of a net that ships with Mohs.

    Args:
        module: The trained net, of architecture ``arch``.
        name: What follows ``bundled:``.
        arch: Its name in ``NETS``.
        recipe: One line: what made it.
        numbers: Measured figures, as JSON can hold them.
        folder: Where to; the package's own folder by default.

    Returns:
        The path of the weights.

    Raises:
        ModelError: The architecture is unknown or the weights do not belong to it.
    """
    if arch not in NETS:
        raise ModelError(f"no reference net {arch!r}; allowed are {_nets()}.")
    fit(NETS[arch](), module.state_dict(), f"bundled:{name}")
    path = (folder or BUNDLED) / f"{name}.safetensors"
    save_weights(module, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    info = {"arch": arch, "recipe": recipe, "sha256": digest, "numbers": dict(numbers)}
    if against := getattr(module, "trained_against", None):
        info["against"] = against
    write_atomically((json.dumps(info, indent=2) + "\n").encode(), path.with_suffix(".json"))
    return path


def _load_bundled(name: str, folder: Path | None = None) -> nn.Module:
    info = bundled_info(name, folder=folder)
    path = check_file((folder or BUNDLED) / f"{name}.safetensors")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != info["sha256"]:
        raise ModelError(
            f"bundled:{name}: {path} has SHA-256 {digest}, its description says {info['sha256']}. "
            "The file was changed; install Mohs again."
        )
    if info["arch"] not in NETS:
        raise ModelError(f"bundled:{name}: unknown architecture {info['arch']!r}; known are {_nets()}.")
    module = NETS[info["arch"]]()
    _fill(module, path)
    _note_training(module, info)
    return module


def _note_training(module: nn.Module, facts: Mapping[str, Any]) -> None:
    """Let the module say which attack it was trained against, where its file does; a check of evaluations asks."""
    if isinstance(facts.get("against"), str):
        module.__dict__["trained_against"] = facts["against"]


def _nets() -> str:
    return ", ".join((*NETS, "package.module:factory"))


def _allowed() -> str:
    return ", ".join(("bundled:NAME", *NETS, *(form for form, _ in _FORMS)))

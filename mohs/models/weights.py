"""Weights on disk: written atomically, read without pickle or under torch's restricted one, fitted with clear words."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mohs.errors import ModelError

SUFFIXES = (".safetensors", ".pt", ".pth")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.")  # left by DataParallel and by torch.compile


def weights_hash(module: nn.Module) -> str:
    """SHA-256 (hex) over names, types, shapes and bytes of all weights and buffers, in order of their names.

    >>> a, b = nn.Linear(2, 1), nn.Linear(2, 1)
    >>> weights_hash(a) == weights_hash(b), weights_hash(a) == weights_hash(a)
    (False, True)
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous()
            digest.update(f"{name} {flat.dtype} {list(flat.shape)}\n".encode())
            digest.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{name} {value!r}\n".encode())
    return digest.hexdigest()


def write_atomically(data: bytes, path: Path) -> None:
    """Write next to the target and rename: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # mkstemp keeps files private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_weights(module: nn.Module, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write all weights and buffers of a module as a safetensors file, atomically.

    Args:
        module: Whose ``state_dict`` is written; tensors that share memory are written once per name.
        path: The target, ending in .safetensors.
        metadata: Anything JSON can hold, for ``read_metadata``; ``arch`` lets ``load`` build the net by itself.

    Raises:
        ModelError: Another ending, weights that are no tensors, or metadata that JSON cannot hold.
    """
    from safetensors.torch import save

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ModelError(f"cannot save weights as {path.name}; the name must end in .safetensors.")
    state = module.state_dict()
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise ModelError(f"cannot save {_some(odd)}: not tensors. Only weights and buffers can be saved.")
    try:
        # one entry only: safetensors writes several in no fixed order, and equal nets should give equal files
        text = {"mohs": json.dumps(dict(metadata), sort_keys=True)} if metadata else None
    except (TypeError, ValueError) as error:
        raise ModelError(f"metadata must be something JSON can hold ({error}).") from error
    write_atomically(save({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}, text), path)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What ``save_weights`` was given as metadata; empty for files of other origin."""
    from safetensors import SafetensorError, safe_open

    path = check_file(path)
    try:
        with safe_open(path, framework="pt") as stream:
            text = (stream.metadata() or {}).get("mohs", "{}")
        found = json.loads(text)
    except (SafetensorError, ValueError) as error:
        raise ModelError(f"{path}: not a safetensors file that can be read ({error}).") from error
    return found if isinstance(found, dict) else {}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors, .pt or .pth file by name, on the CPU.

    A .pt or .pth is read under torch's ``weights_only`` rule, and there is no way around it: a file that needs more
    is refused. A state dict one level down (``{"state_dict": ...}`` and the like) is taken out.

    Raises:
        ModelError: No such file, a web page or a pointer in its place, damage, or anything but tensors inside.
    """
    return read_with_notes(path)[0]


def read_with_notes(path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors, and what had to be done to get at them."""
    path = check_file(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ModelError(f"{path}: unknown kind of weights; allowed endings are {', '.join(SUFFIXES)}.")
    if path.suffix.lower() == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path), []
        except (SafetensorError, ValueError, KeyError) as error:
            raise ModelError(f"{path}: damaged or no safetensors file ({error}). Fetch it again.") from error
    return _unwrap(_torch_load(path), path)


def _torch_load(path: Path) -> Any:
    import pickle

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes about old formats
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path}: refused, it needs more than plain tensors ({_first_line(error)}). A file that runs code when "
            "read is never opened. Where you trust it, save model.state_dict() again with torch.save or safetensors."
        ) from error
    except Exception as error:  # a damaged archive can fail in any way
        raise ModelError(
            f"{path}: cannot be read as a state dict ({_first_line(error)}). It may be cut off, or a whole program "
            "(TorchScript); save model.state_dict() instead."
        ) from error


def _unwrap(found: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    notes = []
    if isinstance(found, Mapping) and not _all_tensors(found):
        for key in _WRAPPERS:
            if _all_tensors(found.get(key)):
                found = found[key]
                notes.append(f"took the weights from entry {key!r} of the file")
                break
    if not _all_tensors(found):
        what = f"entries {_some(list(map(str, found)))}" if isinstance(found, Mapping) else type(found).__name__
        raise ModelError(
            f"{path}: holds no state dict but {what}; allowed are tensors by name, at the top or under "
            f"{', '.join(_WRAPPERS)}. Save model.state_dict()."
        )
    return dict(found), notes


def _all_tensors(found: Any) -> bool:
    return (
        isinstance(found, Mapping)
        and len(found) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())
    )


def fit(module: nn.Module, state: Mapping[str, Tensor], where: str) -> list[str]:
    """Put a state dict into a module; answers what had to be adapted, raises ModelError where it does not fit."""
    own, notes = module.state_dict(), []
    for prefix in _PREFIXES:
        if all(k.startswith(prefix) for k in state) and not all(k.startswith(prefix) for k in own):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
            notes.append(f"dropped the prefix {prefix!r} from all names")
    missing = [k for k in own if k not in state]
    counters = [k for k in missing if k.endswith("num_batches_tracked")]  # unused in eval mode, absent in old files
    missing = [k for k in missing if k not in counters]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k} ({list(state[k].shape)} in the file, {list(v.shape)} in the net)"
        for k, v in own.items()
        if k in state and isinstance(v, Tensor) and v.shape != state[k].shape
    ]
    faults = []
    if missing:
        faults.append(f"the file lacks {_some(missing)}")
    if unexpected:
        faults.append(f"the net has no {_some(unexpected)}")
    if shapes:
        faults.append(f"other shapes: {_some(shapes)}")
    if faults:
        raise ModelError(f"{where}: weights and net do not fit: {'; '.join(faults)}. Is it the right architecture?")
    broken = [k for k, v in state.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if broken:
        raise ModelError(f"{where}: NaN or infinite weights in {_some(broken)}. The training or the file is broken.")
    other = sorted({str(v.dtype) for k, v in state.items() if v.dtype != own[k].dtype})
    if other:
        notes.append(f"converted weights from {', '.join(other)} to the types of the net")
    try:
        module.load_state_dict(dict(state), strict=not counters)
    except RuntimeError as error:
        raise ModelError(f"{where}: the net refuses the weights ({_first_line(error)}).") from error
    return notes


def check_file(path: str | Path) -> Path:
    """The path, if there is a file with content that is not a failed download; ModelError otherwise."""
    path = Path(path).expanduser()
    if not path.is_file():
        what = "is a directory, not a file" if path.is_dir() else "does not exist"
        raise ModelError(f"{path} {what}. Check the path; relative ones start at {Path.cwd()}.")
    try:
        with path.open("rb") as stream:
            start = stream.read(512).lstrip().lower()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error}).") from error
    if not start:
        raise ModelError(f"{path}: the file is empty. Fetch it again.")
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise ModelError(f"{path}: looks like an HTML page, not a model; the download failed. Fetch the file again.")
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path}: a Git LFS pointer, not the file itself. Run git lfs pull.")
    return path


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__


def _some(names: list[str], most: int = 6) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest

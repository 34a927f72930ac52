"""Make the peers importable beside a CPU build of torch and without their unused dependencies.

Only the benchmark uses this; nothing of it is part of Mohs.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import types
from pathlib import Path

# A torch library fragment is withdrawn when its Python object dies, so the objects are kept here.
_fragments: list[object] = []


def prepare() -> None:
    """Do everything below once; calling it again does nothing."""
    # foolbox imports GitPython, which raises at import time on a machine without the git program.
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    stub_visdom()
    declare_torchvision_operators()
    put_back_zero_gradients()


def put_back_zero_gradients() -> None:
    """Define the helper that torch dropped in 1.9: advertorch imports it for an attack that no benchmark uses."""
    gradcheck = importlib.import_module("torch.autograd.gradcheck")  # the package shows a function by that name
    if not hasattr(gradcheck, "zero_gradients"):
        gradcheck.__dict__["zero_gradients"] = lambda x: None


def stub_visdom() -> None:
    """Put an empty ``visdom`` in place: adv-lib imports it for a plotting callback that no benchmark uses."""
    if "visdom" in sys.modules or importlib.util.find_spec("visdom") is not None:
        return
    module = types.ModuleType("visdom")
    module.__dict__["Visdom"] = type("Visdom", (), {})
    sys.modules["visdom"] = module


def declare_torchvision_operators() -> list[str]:
    """Declare the schemas of torchvision's compiled operators where its binary does not fit this torch.

    torchvision is published compiled against a CUDA build of torch. Beside a CPU build its binary does not
    load, and then the import fails with "operator torchvision::nms does not exist". adv-lib imports it for a
    perceptual distance, so without this even its plain attacks cannot be reached. With the schemas declared,
    all of torchvision works but the operators themselves (nms, roi_align and the like).

    Returns:
        The names declared; empty where torchvision is absent, already imported, or has a binary that loads.
    """
    import torch
    from torch import library as operators

    if _fragments or "torchvision" in sys.modules:
        return []
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parent
    for binary in sorted(folder.glob("_C.*")):
        try:
            torch.ops.load_library(str(binary))
        except (OSError, RuntimeError):
            continue
        return []
    names: set[str] = set()
    for file in ("_meta_registrations.py", "_autograd_registrations.py"):
        source = (folder / file).read_text(encoding="utf-8") if (folder / file).is_file() else ""
        names.update(re.findall(r'@register_meta\("(\w+)"', source))
        names.update(re.findall(r'"torchvision::(\w+)"', source))
    fragment = operators.Library("torchvision", "DEF")
    for name in sorted(names):
        fragment.define(f"{name}(Tensor x) -> Tensor")  # the true signature is never looked at
    _fragments.append(fragment)
    return sorted(names)

"""scikit-image, where it is installed."""

from __future__ import annotations

import importlib
from typing import Any

from mohs.errors import UsageError


def restoration(asked: str) -> Any:
    """The module ``skimage.restoration``.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module("skimage.restoration")
    except ImportError as error:
        raise UsageError(
            f'{asked} needs scikit-image, which is not installed ({error}). Install it: python -m pip install "mohs[images]".'
        ) from error

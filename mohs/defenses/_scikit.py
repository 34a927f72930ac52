"""scikit-image, where it is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

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


def on_channels(function: Callable[..., Any], image: np.ndarray[Any, Any], **settings: Any) -> np.ndarray[Any, Any]:
    """A function of the library on an image [C, H, W]; one channel is a plain grey image, as the library drops its axis."""
    if len(image) == 1:
        return np.asarray(function(image[0], **settings))[None]
    return np.asarray(function(image, **settings, channel_axis=0))

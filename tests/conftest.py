"""Settings for every test: one thread each, so that parallel tests do not fight for cores, and reproducible examples."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
settings.register_profile("mohs", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("mohs")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """Outside data for comparisons (MNIST and other people's nets); its absence skips a test with the reason."""
    folder = Path(os.environ.get("MOHS_SHARED", ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"no outside data at {folder} (set MOHS_SHARED)")
    return folder

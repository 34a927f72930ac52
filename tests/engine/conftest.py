"""What several of these files need."""

from __future__ import annotations

from pathlib import Path

import pytest
from film import film


@pytest.fixture(scope="session")
def filmed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A whole run, and copies of its directory from one moment to the next."""
    return film(tmp_path_factory.mktemp("film"))

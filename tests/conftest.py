"""Every test has caches of its own, and no network unless it starts a server itself."""

import os
import tempfile
from pathlib import Path

import pytest

# Read when the libraries are imported, so set before any test module is.
_home = tempfile.TemporaryDirectory(prefix="fisher-mask-tests-")
os.environ |= {"HF_HOME": _home.name, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# The models are tiny and tests run side by side: threads that wait for each other would take most of the time.
os.environ |= {"OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISHER_MASK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint, a classifier of two labels."""
    # Here, so that the libraries are imported after what is set above.
    from tests import tiny

    return tiny.checkpoint(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file that it can be measured on."""
    from tests import tiny

    return tiny.write_data(tmp_path / "data.jsonl")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two siblings, each with a sidecar of made-up Fisher information."""
    from tests import tiny
    from tests.test_check import measure

    one = tiny.checkpoint(tmp_path / "one")
    two = tiny.sibling(tmp_path / "two", one, seed=1)
    for seed, folder in enumerate((one, two)):
        measure(folder, seed)
    return one, two

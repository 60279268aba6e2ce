"""What every test may rely on: one thread, fixed examples, folders of its own, no network."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("medfed", derandomize=True, deadline=None)
settings.load_profile("medfed")


@pytest.fixture(autouse=True, scope="session")
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Caches and keys of the tests are the tests' own, and are shared by them."""
    folder = tmp_path_factory.mktemp("medfed")
    os.environ["MEDFED_CACHE"] = str(folder / "cache")
    os.environ["MEDFED_CONFIG"] = str(folder / "config")
    yield folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests need a GPU; that is the only reason for which a test is not run."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

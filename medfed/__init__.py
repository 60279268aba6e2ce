"""medfed: adapt medical-imaging foundation models across hospitals that may not share images.

Notebook use::

    import medfed

    run = medfed.simulate("examples/brain-structures.toml")
    model = medfed.load_adapter(run.folder / "adapter", backbone)
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from typing import Any

# Flower would otherwise report usage and look for updates over the network, from inside a hospital.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Resolve the notebook API by entry point, so that this package imports no role."""
    for entry in entry_points(group="medfed.api", name=name):
        return entry.load()
    raise AttributeError(f"module 'medfed' has no attribute {name!r}")

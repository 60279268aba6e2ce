"""The version of Flower that medfed was tested with, and the refusal of any other.

What connects sites and server uses names that Flower does not promise to keep (``client/flower_link.py``,
``server/flower_link.py``); another minor version may move them, or speak otherwise on the wire. So it is refused
when a process starts, not when the first message comes.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from medfed.errors import LinkError

WORKS_WITH = "1.41"
"""Minor version of Flower whose private names the contract tests know."""


def require_flower() -> str:
    """The installed version of Flower, if it is one that works.

    Raises:
        LinkError: names the version that works.
    """
    try:
        installed = version("flwr")
    except PackageNotFoundError:
        installed = "none"
    if installed.split(".")[:2] != WORKS_WITH.split("."):
        raise LinkError(
            f"Expected Flower {WORKS_WITH}.x, got {installed}; install it with: pip install 'flwr=={WORKS_WITH}.*'."
        )
    return installed

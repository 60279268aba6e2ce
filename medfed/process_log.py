"""How a long-lived process logs: events of ours to standard error, one line each."""

from __future__ import annotations

import logging
import sys


def log_to_stderr(*, verbose: bool = False) -> None:
    """Log events to standard error, in place of what imported libraries may have set up.

    Args:
        verbose: details too, tracebacks included.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        force=True,  # libraries that were imported before may have set up another form
    )
    logging.getLogger("medfed").setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.getLogger("flwr").setLevel(logging.WARNING)  # otherwise a line for every look into a mailbox

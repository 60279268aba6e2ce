"""Measurements in a process of their own, which runs on one thread and answers in lines of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

ENVIRONMENT = {
    **os.environ,
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
}
"""The libraries read the number of threads when they are loaded, so it cannot be set in the caller's process."""


def answers(module: str, *question: str) -> Iterator[dict[str, Any]]:
    """The lines that ``python -m module question...`` prints, as it prints them.

    Raises:
        RuntimeError: if the process fails; with the end of what it said.
    """
    command = [sys.executable, "-m", module, *question]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(  # noqa: S603 - this interpreter, and a module of ours
            command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                yield json.loads(line)
        if process.returncode != 0:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{errors.read()[-2000:]}")

"""TOML that a person wrote: what it says, or one kind of error for all that is wrong with it."""

from __future__ import annotations

import tomllib
from typing import Any


def parse_toml(text: str) -> dict[str, Any]:
    """What a TOML document says.

    Raises:
        TOMLDecodeError: for text that is not TOML, an integer of thousands of digits, and nesting without end, for
            which Python's reader has errors of other kinds.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:
        raise tomllib.TOMLDecodeError("an integer with too many digits") from None
    except RecursionError:
        raise tomllib.TOMLDecodeError("values inside values, too many levels deep") from None

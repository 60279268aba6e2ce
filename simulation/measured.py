"""From the rows of a metric, one for each resample of the patients, to a value with its interval."""

from __future__ import annotations

from medfed.metrics.resampling import Values, estimate
from server.evaluation import Measured


def measured(value_R: Values) -> Measured | None:
    """The value of row 0 with its 95 % interval over the other rows; None if row 0 has no value."""
    found = estimate(value_R)
    return None if found is None else Measured(value=found.value, low=found.low, high=found.high)

"""Metrics as small pure functions of arrays; every one of them under any number of resampled cohorts at once."""

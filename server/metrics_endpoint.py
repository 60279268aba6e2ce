"""A Prometheus endpoint that says how a run is doing; the same facts as ``status.json``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from medfed.errors import LinkError
from server.run_status import Phase, RunStatus

_PHASES: tuple[Phase, ...] = ("waiting", "running", "paused", "finished", "failed")


class StatusCollector(Collector):
    """Reads the status whenever it is asked for.

    Args:
        snapshot: the status now.
    """

    def __init__(self, snapshot: Callable[[], RunStatus]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """One gauge for each fact; those of sites carry the site's name."""
        status = self._snapshot()
        study = [status.study]
        for name, what, value in (
            ("medfed_round", "last completed round", status.round),
            ("medfed_rounds", "rounds of the study", status.num_rounds),
            ("medfed_tries", "how often the run was begun or resumed", status.tries),
            ("medfed_round_seconds", "seconds of the last completed round", status.round_seconds),
            ("medfed_epsilon_planned", "epsilon that the study may spend at a site", status.epsilon_planned),
        ):
            if value is not None:
                gauge = GaugeMetricFamily(name, what, labels=["study"])
                gauge.add_metric(study, value)
                yield gauge
        phase = GaugeMetricFamily("medfed_phase", "1 for the phase of the run", labels=["study", "phase"])
        for one in _PHASES:
            phase.add_metric([*study, one], float(status.phase == one))
        yield phase
        for name, what, field in (
            ("medfed_site_online", "1 if the site gave a sign in the last minute", "is_online"),
            ("medfed_site_round", "last round that the site answered for", "round"),
            ("medfed_site_answers", "answers that came", "answers"),
            ("medfed_site_refusals", "answers that refused", "refusals"),
            ("medfed_site_sent_bytes", "payload sent to the site", "bytes_sent"),
            ("medfed_site_received_bytes", "payload that came from the site", "bytes_received"),
            ("medfed_site_epsilon", "epsilon spent by this study, as the site told", "epsilon"),
        ):
            gauge = GaugeMetricFamily(name, what, labels=["study", "site"])
            for site, facts in status.sites.items():
                if (number := getattr(facts, field)) is not None:
                    gauge.add_metric([*study, site], float(number))
            yield gauge


def serve_metrics(snapshot: Callable[[], RunStatus], *, host: str, port: int) -> None:
    """Answer Prometheus at ``http://host:port/metrics`` from a thread, until the process ends.

    Raises:
        LinkError: if the port cannot be had.
    """
    registry = CollectorRegistry()
    registry.register(StatusCollector(snapshot))
    try:
        start_http_server(port, host, registry=registry)
    except OSError as error:
        raise LinkError(f"Expected to serve metrics at {host}:{port}, got: {error}; name another port.") from None

"""``medfed server``: the coordinator's processes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Run a consortium's server.", no_args_is_help=True, add_completion=False, rich_markup_mode="rich"
)

_Consortium = Annotated[
    Path, typer.Argument(metavar="CONSORTIUM_DIR", help="Folder that 'medfed provision' made.", show_default=False)
]
_Superlink = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Where the SuperLink is, if not where CONSORTIUM.toml says."),
]
_MetricsPort = Annotated[
    int | None, typer.Option(metavar="PORT", help="Answer Prometheus at this port.", min=1, max=65535)
]
_MetricsHost = Annotated[str, typer.Option(metavar="HOST", help="Address of that port.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")]
_Wait = Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait for a quorum of sites.", min=0)]
_Tries = Annotated[
    int, typer.Option(metavar="N", help="Give up after this many tries in a row without a completed round.", min=1)
]


@app.command(no_args_is_help=True)
def start(
    consortium: _Consortium,
    listen: Annotated[
        str | None,
        typer.Option(metavar="HOST", help="Address to listen at; by default all, or the loopback one of a demo."),
    ] = None,
    health: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="gRPC health service without TLS, for this machine.")
    ] = None,
) -> None:
    """Serve the consortium's one port until stopped; knows the sites of the roster and nobody else.

    Sites that enrol later are known within half a minute. May be killed and started again: messages and registrations
    are in a database. Run it under systemd or in a container that restarts it.

    [bold]Example[/bold]

      medfed server start consortium
    """
    from server.service import serve_consortium

    serve_consortium(consortium, listen=listen, health_address=health)


@app.command(no_args_is_help=True)
def run(
    consortium: _Consortium,
    study: Annotated[Path, typer.Argument(metavar="STUDY_FILE", help="Signed study.", show_default=False)],
    wait: _Wait = 600.0,
    tries: _Tries = 5,
    superlink: _Superlink = None,
    metrics_port: _MetricsPort = None,
    metrics_host: _MetricsHost = "127.0.0.1",
    as_json: _Json = False,
) -> None:
    """Run a signed study to its end, through crashes of sites and of the server.

    Waits for a quorum of sites; each round has the study's deadline and quorum. A round that fails is tried again from
    the last checkpoint, and sites send again what they have answered. Ends with adapter, numbers and report in
    CONSORTIUM_DIR/runs.

    [bold]Example[/bold]

      medfed server run consortium consortium/studies/my-study-3f1c9a2b7d4e.study
    """
    from server.run_command import HowToRun, run_signed_study

    how = HowToRun(
        wait_s=wait,
        tries=tries,
        superlink=superlink,
        metrics_host=metrics_host,
        metrics_port=metrics_port,
        as_json=as_json,
    )
    run_signed_study(consortium, study, how)


@app.command(no_args_is_help=True)
def resume(
    consortium: _Consortium,
    run_dir: Annotated[Path, typer.Argument(help="Run folder of a run that was stopped.", show_default=False)],
    wait: _Wait = 600.0,
    tries: _Tries = 5,
    superlink: _Superlink = None,
    metrics_port: _MetricsPort = None,
    metrics_host: _MetricsHost = "127.0.0.1",
    as_json: _Json = False,
) -> None:
    """Go on with a run from its last checkpoint; ends with the adapter of an undisturbed one.

    [bold]Example[/bold]

      medfed server resume consortium consortium/runs/my-study-20260101-120000
    """
    from server.run_command import HowToRun, resume_run

    how = HowToRun(
        wait_s=wait,
        tries=tries,
        superlink=superlink,
        metrics_host=metrics_host,
        metrics_port=metrics_port,
        as_json=as_json,
    )
    resume_run(consortium, run_dir, how)


@app.command(no_args_is_help=True)
def status(
    place: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Run folder, or CONSORTIUM_DIR for its newest run.", show_default=False),
    ],
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show a live table until the run ends.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show how a run is doing: rounds, sites, last seen, epsilon as sites told it, bytes.

    [bold]Example[/bold]

      medfed server status consortium --watch
    """
    from server.status_table import show_status

    show_status(place, watch=watch, as_json=as_json)

"""``medfed study plan``: the numbers of a study, before it is approved."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from server.study_plan import NoiseMode, StudyPlan

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command()
def plan(
    study: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="Study file.", show_default=False)],
    rounds: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Synchronous rounds that the sites could do; the study's by default."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a study would cost and promise, before anybody approves it.

    How many sites a sum needs, how much noise there is beside the signal, bytes, and whether to share noise.

    Trains and spends nothing. Needs the backbone's weights, to count the adapter's parameters.

    [bold]Examples[/bold]

      medfed study plan examples/brain-structures-consortium.toml

      medfed study plan study.toml --rounds 200 --json
    """
    from rich.console import Console

    from medfed.device import choose_device
    from medfed.models.adapted import resolve
    from medfed.study import read_study
    from server.study_plan import plan_study

    # Standard output carries the result and nothing else: whatever a library prints meanwhile goes to stderr.
    with contextlib.redirect_stdout(sys.stderr):
        planned = plan_study(resolve(read_study(study), choose_device("cpu")), possible_rounds=rounds)
    if as_json:
        typer.echo(planned.model_dump_json())
    else:
        _show(planned, Console())


def _show(planned: StudyPlan, console: Console) -> None:
    """The consortium, the noise, the bytes, then the advice and what to think about."""
    console.print(
        f"{planned.study}: {planned.num_sites} sites, {planned.num_rounds} rounds, "
        f"{planned.num_parameters:,} parameters",
        style="bold",
        markup=False,
        highlight=False,
    )
    if planned.quorum is not None:
        console.print(_consortium(planned))
    if planned.modes:
        console.print(_noise(planned))
    console.print(_bytes(planned))
    advice = f"recommended: trust = {planned.recommended!r}; " if planned.recommended else ""
    console.print(f"{advice}{planned.reason}.", markup=False, highlight=False)
    for warning in planned.warnings:
        console.print(warning, style="bold red", markup=False, highlight=False)


def _consortium(planned: StudyPlan) -> Table:
    """n, c, t, k, h and dropouts."""
    assert planned.quorum is not None
    quorum, table = planned.quorum, _table("secure aggregation", "sites")
    rows = {
        "n  in the study": planned.num_sites,
        "c  that may collude with the server": quorum.max_colluding,
        "t  that must agree and help to open a sum": quorum.threshold,
        "k  in a sum at least (k_min)": quorum.min_sites,
        "h  honest ones among them (h_min = k - c)": quorum.min_honest,
        "   that may drop out of a round (n - k)": quorum.dropouts,
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _noise(planned: StudyPlan) -> Table:
    """The study's way of adding noise, and the other one at the same epsilon and steps."""
    modes = planned.modes
    labels = [f"{mode.trust}{' (this study)' if mode.trust == planned.trust else ''}" for mode in modes]
    table = _table("noise, where trust is", *labels)
    table.add_row(
        f"epsilon of each site, delta {planned.delta:g}, {planned.unit}", *(f"{m.epsilon:.3f}" for m in modes)
    )
    table.add_row("noised steps / rounds", *(f"{mode.steps} / {mode.rounds}" for mode in modes))
    table.add_row("noise multiplier z", *(f"{mode.noise_multiplier:.4f}" for mode in modes))
    table.add_row(
        "sites whose noise is counted on (h)", *("itself" if m.min_honest is None else str(m.min_honest) for m in modes)
    )
    table.add_row("noise that a site adds, in clip norms C", *(f"{mode.site_noise_std:.3f}" for mode in modes))
    for place, name in _places(modes):
        releases = [mode.releases[place] if place < len(mode.releases) else None for mode in modes]
        for what, attribute in (
            ("noise of the sum, in C", "noise_std"),
            ("m, beside data in one place", "m"),
            ("noise / signal of a step", "noise_to_signal"),
        ):
            cells = ["-" if release is None else f"{getattr(release, attribute):.3f}" for release in releases]
            table.add_row(f"{what}: {name}", *cells)
    table.add_row("noise / signal of a step: a site alone", *(_alone(mode) for mode in modes))
    return table


def _places(modes: tuple[NoiseMode, ...]) -> list[tuple[int, str]]:
    """Where releases stand, and of how many sites they are; ways that need other numbers of sites say both."""
    names = []
    for place in range(max(len(mode.releases) for mode in modes)):
        counts = dict.fromkeys(mode.releases[place].num_sites for mode in modes if place < len(mode.releases))
        names.append((place, f"{'all ' if place == 0 else ''}{' or '.join(map(str, counts))} sites"))
    return names


def _alone(mode: NoiseMode) -> str:
    if mode.alone is None:
        return "never seen"
    least, most = (f"{ratio:.3f}" for ratio in mode.alone)
    return least if least == most else f"{least}-{most}"


def _bytes(planned: StudyPlan) -> Table:
    """Per site and round, and for keys."""
    traffic, table = planned.traffic, _table("bytes of a site", "up", "down")
    table.add_row("each round", f"{traffic.round_up:,}", f"{traffic.round_down:,}")
    if traffic.sums_per_keys:
        sums = f"keys, once for {traffic.sums_per_keys} sums"
        table.add_row(sums, f"{traffic.keys_up:,}", f"{traffic.keys_down:,}")
    return table


def _table(first: str, *others: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table

"""``rltrain compare`` and ``rltrain report``: runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from rltrain.config.load import load_recipe
from rltrain.errors import UserError


def compare_command(
    recipes: Sequence[Path], seeds: int, out: Path, profile: str | None, overrides: Sequence[str]
) -> int:
    """``rltrain compare``: trains the runs that are not finished, one after the other; then prints the
    table and writes it to ``out``.
    """
    from rltrain.analysis.compare_runs import collect_runs, compare_conditions, plan_runs, run_all
    from rltrain.analysis.comparison import markdown
    from rltrain.analysis.pages.comparison_page import write_comparison

    console = Console(highlight=False)
    notes = compare_conditions(recipes, profile, overrides)
    from rltrain.build.digests import common_date  # which imports torch

    date = common_date([load_recipe(path, profile=profile, overrides=overrides) for path in recipes], out)
    overrides = [*overrides, *([] if date is None else [f"data.date={date}"])]
    plan = plan_runs(recipes, seeds, out, profile, overrides)
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    run_all(plan, lambda line: console.print(line, markup=False, soft_wrap=True))

    names = ", ".join(path.stem for path in recipes)
    profile_note = [f"profile {profile}"] if profile else []
    comparison = collect_runs(f"{names}: {seeds} seeds each", [*profile_note, *overrides, *notes], plan)
    console.print(markdown(comparison), markup=False, soft_wrap=True)
    for path in write_comparison(comparison, out):
        console.print(str(path), markup=False, soft_wrap=True)
    return 0


def watch_command(runs: Sequence[str], port: int) -> int:
    """``rltrain report RUN --watch``: serves the run's page on the loopback until Ctrl-C."""
    from rltrain.analysis.pages.live import live_server

    if len(runs) != 1:
        raise UserError(f"--watch shows one run, and {len(runs)} are given; name one folder")
    with live_server(Path(runs[0]), port) as server:
        server.daemon_threads = True
        url = f"http://{server.server_address[0]}:{server.server_port}/"
        Console(highlight=False).print(f"{runs[0]} at {url} (Ctrl-C ends)", markup=False, soft_wrap=True)
        server.serve_forever()
    return 0


def report_command(runs: Sequence[str], out: Path) -> int:
    """``rltrain report``: the same table, figure and page for the runs on the command line; a run without
    report.html gets one.
    """
    from rltrain.analysis.comparison import Comparison, markdown
    from rltrain.analysis.curves import Curves
    from rltrain.analysis.pages.comparison_page import write_comparison
    from rltrain.analysis.pages.run_page import write_missing_report

    methods: dict[str, list[Curves]] = {}
    for text in runs:
        name, equals, folders = text.partition("=")
        if not equals:
            name = Path(text).name
            folders = text
        methods.setdefault(name, []).extend(Curves.read(Path(folder)) for folder in folders.split(","))

    console = Console(highlight=False)
    for run in (run for method_runs in methods.values() for run in method_runs):
        if run.folder is not None and (written := write_missing_report(run.folder)) is not None:
            console.print(str(written), markup=False, soft_wrap=True)
    comparison = Comparison(", ".join(methods), (), methods)
    console.print(markdown(comparison), markup=False, soft_wrap=True)
    for path in write_comparison(comparison, out):
        console.print(str(path), markup=False, soft_wrap=True)
    return 0

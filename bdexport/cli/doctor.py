"""``bdexport doctor``: what is installed here, what is missing or broken, and the line that mends it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bdexport.cli.console import FittedTable, progress, table_console, write_json_result
from bdexport.cli.options import writable
from bdexport.errors import BackendError

if TYPE_CHECKING:
    from rich.table import Table

    from bdexport.doctor import Report

STYLES = {"ok": "green", "build only": "cyan", "missing": "yellow", "broken": "red"}


def doctor(
    json: Annotated[
        str | None, typer.Option(help="Also write the result as JSON to this file ('-': stdout).", callback=writable)
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="A row for every package, with versions and remarks.")
    ] = False,
) -> None:
    """Show what is installed and usable here, and how to get the rest.

    What is missing is no failure: exit code 1 means that the core is broken or that no backend can run.
    """
    from bdexport.doctor import examine, probes

    with progress() as bar:
        stage = bar.add_task("looking at packages", total=len(probes()))
        report = examine(lambda name: bar.update(stage, advance=1))
    out = table_console(json)
    out.print(findings_table(report) if verbose else summary_table(report))
    for remedy, names in remedies(report).items():
        out.print(f"{', '.join(names)}: {remedy}", soft_wrap=True)  # a command must stay in one piece
    if json is not None:
        write_json_result(json, report.to_json())
    failure = report.failure()
    if failure is not None and failure.group == "core":
        raise BackendError(f"{failure.name} is {failure.state}: {failure.detail}", remedy=failure.remedy)
    if failure is not None:
        raise BackendError("no backend can run here", remedy=failure.remedy)


def summary_table(report: Report) -> Table:
    """One row for each group and state, so that all of it fits a screen; what is broken has a row of its own."""
    from rich.text import Text

    rows: dict[tuple[str, str, str], list[str]] = {}
    for found in report.findings:
        own_row = found.name if found.state == "broken" else ""
        detail = f": {found.detail}" if own_row else ""
        version = f" {found.version.partition('-')[0]}" if found.version and found.group != "backend" else ""
        rows.setdefault((found.group, found.state, own_row), []).append(f"{found.name}{version}{detail}")
    table = FittedTable("part of", "state", "what", title="bdexport doctor (--verbose has every remark)")
    for (group, state, _), names in rows.items():
        table.add_row(group, Text(state, style=STYLES[state]), ", ".join(names))
    return table


def findings_table(report: Report) -> Table:
    """One row for each finding: what, its group (the extra that installs it), state, version and remark."""
    from rich.text import Text

    table = FittedTable(title="bdexport doctor")
    for column in ("what", "part of", "state", "version", "remark"):
        table.add_column(column, overflow="fold")
    for found in report.findings:
        state = Text(found.state, style=STYLES[found.state])
        table.add_row(found.name, found.group, state, found.version or "", found.detail)
    return table


def remedies(report: Report) -> dict[str, list[str]]:
    """Each line that mends something, with what it mends."""
    lines: dict[str, list[str]] = {}
    for found in report.findings:
        if found.remedy is not None:
            names = lines.setdefault(found.remedy, [])
            if f"{found.name} {found.state}" not in names:  # a package and the backend named after it
                names.append(f"{'backend ' * (found.group == 'backend')}{found.name} {found.state}")
    return lines

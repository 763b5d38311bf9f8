"""
The report on some runs: one page that opens anywhere, also offline, and pictures beside it.
"""

from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from olmo_core.exceptions import OLMoConfigurationError
from rich.markup import escape
from rich.table import Table

from ..drafts import write_whole
from ..extras import require
from .criteria import check_criteria
from .drawn import Drawn, draw
from .figures_png import draw_png
from .findings import notes, statement
from .page import Content, render
from .panels import panels
from .results import Results, RunResult, load_runs
from .statistics import Study, study
from .tables import COLUMNS, arm_row, rate_text

__all__ = ["Report", "write_report"]


@dataclass(frozen=True)
class Report:
    """A report that was written."""

    page: Path
    study: Study

    def statement(self) -> List[str]:
        """What was found, a sentence each."""
        return statement(self.study)

    def table(self) -> Table:
        """What the page has of each arm, in short."""
        shown = [column for column in COLUMNS if column.short]
        table = Table(box=None)
        for column in shown:
            table.add_column(
                column.title, justify="left" if column.text else "right", overflow="fold"
            )
        for arm in self.study.arms:
            cells = arm_row(arm)
            table.add_row(*(escape(cells[column.title]) for column in shown))
        return table


def write_report(paths: Sequence[Path], output: Optional[Path] = None) -> Report:
    """
    Compare the runs in some folders and write ``report.html`` and a picture of each figure. What is
    unfinished or has failed is in it as such.

    :param paths: Folders of runs and of comparisons.
    :param output: A folder; default is ``report`` in the only one of the paths, or else here.

    :raises OLMoConfigurationError: If a path is neither, the output cannot be written, or packages
        of the extra ``compare`` are not installed.
    """
    require("compare", "plotly", "scipy")
    results = load_runs(paths)
    folder = output or (Path(paths[0]) if len(paths) == 1 else Path()) / "report"
    found = study(results)
    drawn = draw(found)
    figures = panels(drawn)
    content = Content(
        title=f"Report: {_title(results)}",
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        statement=statement(found),
        criteria=check_criteria(found),
        notes=notes(found),
        study=found,
        drawn=drawn,
        panels=figures,
        configs=_configs(results, drawn),
        facts=_facts(results.runs),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for panel in figures:
            draw_png(panel, folder / f"{panel.key}.png")
        write_whole(folder / "report.html", render(content))
    except OSError as error:
        raise OLMoConfigurationError(
            f"output: {folder} cannot be written ({error.strerror}), allowed is a folder that can"
        ) from None
    return Report(folder / "report.html", found)


def _title(results: Results) -> str:
    names = [comparison.name for comparison in results.comparisons]
    lone = [
        run
        for run in results.runs
        if not any(c.folder in run.folder.parents for c in results.comparisons)
    ]
    names += dict.fromkeys(str(run.config.get("name", run.folder.name)) for run in lone)
    return " and ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _configs(results: Results, drawn: Sequence[Drawn]) -> Dict[str, str]:
    """The exact texts: of comparisons, and of one run of each arm."""
    out = {}
    for comparison in results.comparisons:
        path = comparison.folder / "comparison.yaml"
        out[f"{comparison.name}, the comparison"] = path.read_text(encoding="utf-8")
    for each in drawn:
        for run in each.runs[:1]:
            path = run.folder / "config.yaml"
            if path.is_file():
                seed = "" if run.seed is None else f", seed {run.seed}"
                name = f"{each.arm.name} at rate {rate_text(run.lr)}{seed}"
                out[name] = path.read_text(encoding="utf-8", errors="replace")
    return out


def _facts(runs: Sequence[RunResult]) -> List[List[str]]:
    """What ``run.json`` says, a row for the runs for which it is the same."""
    rows: Dict[Tuple[str, ...], List[RunResult]] = {}
    for run in runs:
        facts = run.facts
        versions = facts.get("versions") or {}
        device = facts.get("device") or {}
        told = (
            ", ".join(f"{name} {version or '(sources)'}" for name, version in versions.items()),
            ": ".join(str(value) for value in device.values()),
            str(facts.get("ranks", "")),
            f"{facts['parameters']:,}" if facts.get("parameters") else "",
        )
        rows.setdefault(told, []).append(run)
    return [
        [str(len(its)), *told, str(its[0].facts.get("command", ""))] for told, its in rows.items()
    ]

"""The report as one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from aligner.report.console import cell, columns_for
from aligner.report.figures import DARK, LIGHT, Theme, learning_curve, ledger, panels, phases, png, styled
from aligner.report.gantt import MOST_RANKS, gantt
from aligner.report.metric_registry import RESHARD
from aligner.report.metrics import CONFIG_FILE, ENVIRONMENT_FILE, Row
from aligner.report.samples import sample_files
from aligner.report.statistics import facts, phase_seconds, run_summary, sync_rate
from aligner.report.traces import read_spans, whole_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAST_ROWS = 12
SYNC_PHASES = {one.name: one.title for one in RESHARD if one.name.startswith("seconds_reshard_")}
EXCERPT = 3000
"""Characters of a samples file."""

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1f2430;--soft:#667085;--line:#e4e7ec}
@media(prefers-color-scheme:dark){:root{--bg:#0f1217;--card:#171b22;--ink:#d7dbe2;--soft:#8d96a5;--line:#2c323d}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1040px;margin:0 auto;padding:32px 20px 60px}h1{font-size:26px;margin:0;overflow-wrap:anywhere}
h2{font-size:16px;margin:0 0 12px}p{margin:0 0 10px}.soft{color:var(--soft)}.lead{font-size:16px;margin:6px 0 20px}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px 20px;margin:16px 0}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(165px,1fr));gap:12px;margin:0 0 16px}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 14px}
.facts dt{color:var(--soft);font-size:12px}.facts dd{margin:2px 0 0;font-size:16px;font-weight:600}
img{width:100%;height:auto;display:block}.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px}
th,td{padding:4px 12px 4px 0;text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
th{color:var(--soft);font-weight:500;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}pre{font:12.5px/1.5 ui-monospace,monospace;margin:8px 0 0;
white-space:pre-wrap;overflow-wrap:anywhere;max-height:460px;overflow:auto}summary{cursor:pointer;font-weight:600}
""".strip()


def page(run_dir: Path, rows: list[Row]) -> str:
    shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts(rows))
    ended = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(rows[-1].get("time") or 0))
    parts = [
        _section("Learning curve", _picture(learning_curve, rows, "learning curve")),
        _section("How it went", _picture(panels, rows, "metrics by step")),
        _timeline(run_dir),
        _section("Seconds by phase", _picture(phases, rows, "seconds by phase") + _phase_table(rows)),
        _section(
            "Resharding",
            _ledger_text(rows) + _picture(ledger, rows, "bytes and rate of each sync") + _sync_table(rows),
        ),
        _section(f"Last {min(len(rows), LAST_ROWS)} rows", _rows_table(rows)),
        _section("Samples", _samples(run_dir)),
        _section("Environment", _environment(run_dir / ENVIRONMENT_FILE)),
        _configuration(run_dir / CONFIG_FILE),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(run_dir.name)} \N{MIDDLE DOT} aligner</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{escape(run_dir.name)}</h1><p class="lead soft">{escape(run_summary(rows))}; last row {ended}</p>'
        f'<dl class="facts">{shown}</dl>{"".join(parts)}</main></body></html>\n'
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _picture(draw: Callable[[Sequence[Row], Theme], Figure | None], rows: Sequence[Row], text: str) -> str:
    """The figure in both themes, inside the page; the browser shows one."""
    sources = []
    for theme in (LIGHT, DARK):
        with styled(theme):
            figure = draw(rows, theme)
            if figure is None:
                return ""
            sources.append(f"data:image/png;base64,{base64.b64encode(png(figure)).decode()}")
    dark = f'<source media="(prefers-color-scheme:dark)" srcset="{sources[1]}">'
    return f'<picture>{dark}<img alt="{escape(text)}" src="{sources[0]}"></picture>'


def _timeline(run_dir: Path) -> str:
    """The last traced step, rank by rank; nothing where the run wrote no timelines, or cut one short.

    Of a large world it is left to tools/report.py: the job's end should not wait for it.
    """
    try:
        spans = read_spans(run_dir)
    except ValueError:
        return ""
    steps = whole_steps(spans)
    if not steps or len({span.rank for span in spans}) > MOST_RANKS:
        return ""
    of_step = [span for span in spans if span.step == steps[-1]]
    picture = _picture(lambda _, theme: gantt(of_step, theme, steps[-1]), (), "what each rank did in one step")
    return _section("One step, rank by rank", picture)


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{escape(value)}</td>" for value in line) + "</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _rows_table(rows: Sequence[Row]) -> str:
    columns = columns_for({name: None for row in rows for name in row})
    lines = [[cell(column.metric, row.get(column.metric)) for column in columns] for row in rows[-LAST_ROWS:]]
    return _table([column.title for column in columns], lines)


def _phase_table(rows: Sequence[Row]) -> str:
    totals = {name: (sum(values), median(values)) for name, values in phase_seconds(rows).items()}
    whole = sum(total for total, _ in totals.values())
    lines = [[name, f"{all_:.2f}", f"{one:.3f}", f"{all_ / whole:.1%}"] for name, (all_, one) in totals.items()]
    return _table(["phase", "seconds", "median a step", "share"], lines) if totals else ""


def _ledger_text(rows: Sequence[Row]) -> str:
    syncs = [row for row in rows if row.get("reshard_moved_bytes") is not None]
    if not syncs:
        return ""
    moved, least = (sum(row.get(f"reshard_{name}_bytes") or 0 for row in syncs) for name in ("moved", "minimum"))
    times = [row["seconds_reshard"] for row in syncs if row.get("seconds_reshard")]
    rates = [rate for row in syncs if (rate := sync_rate(row)) is not None]
    beside = "the computed minimum" if moved == least else f"{moved / least:.3f} times the minimum of {_bytes(least)}"
    if not least:
        beside = (
            "the computed minimum: every region was already where it was needed" if not moved else "the minimum is 0"
        )
    parts = [f"{len(syncs)} steps with a sync moved {_bytes(moved)}, {beside}"]
    parts += [f"median {1000 * median(times):.1f} ms a sync"] if times else []
    parts += [f"median {median(rates):.2f} GB/s"] if rates else []
    changed = sum(row.get("reshard_changed_bytes") or 0 for row in syncs)
    parts += (
        [f"{changed / least:.2%} of the needed bytes had changed"] if 0 < changed < least else []
    )  # all: not compared
    return f"<p>{escape('; '.join(parts))}.</p>"


def _sync_table(rows: Sequence[Row]) -> str:
    """Where a sync's time goes: each phase's seconds on the rank that spent most on it."""
    phases = {name: [float(row.get(name) or 0) for row in rows] for name in SYNC_PHASES}
    syncs = [sum(values) > 0 for values in zip(*phases.values(), strict=True)]
    lines = [
        [
            what,
            f"{sum(phases[name]):.3f}",
            f"{1000 * median(v for v, one in zip(phases[name], syncs, strict=True) if one):.1f}",
        ]
        for name, what in SYNC_PHASES.items()
        if any(phases[name])
    ]
    return _table(["phase of a sync", "seconds", "median ms"], lines) if lines else ""


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def _samples(run_dir: Path) -> str:
    paths = sample_files(run_dir)
    parts = []
    for path in dict.fromkeys(paths[:1] + paths[-1:]):
        text = path.read_text(encoding="utf-8", errors="replace")
        rest = f"\n\u2026 (the rest is in samples/{path.name})" if len(text) > EXCERPT else ""
        opened = " open" if path is paths[-1] else ""
        parts.append(
            f"<details{opened}><summary>{escape(path.stem.replace('_', ' '))}</summary>"
            f"<pre>{escape(text[:EXCERPT] + rest)}</pre></details>"
        )
    return "".join(parts)


def _environment(path: Path) -> str:
    if not path.is_file():
        return ""
    environment = json.loads(path.read_text(encoding="utf-8"))
    shown = {
        name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in environment.items()
    }
    return _table(
        ["what", "found"], [[name, "none" if value in (None, "") else str(value)] for name, value in shown.items()]
    )


def _configuration(path: Path) -> str:
    if not path.is_file():
        return ""
    text = escape(path.read_text(encoding="utf-8", errors="replace"))
    return f"<section><details><summary>Configuration</summary><pre>{text}</pre></details></section>"

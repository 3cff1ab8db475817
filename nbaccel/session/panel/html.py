"""A run as HTML that stays whole wherever a notebook is read.

JupyterLab removes `svg`, `style` tags and scripts from a notebook it does not trust; nbviewer and nbconvert
have none of Jupyter's variables. So: styles as attributes, curves of small boxes, text in the page's own
colour, and colours of middling lightness (Okabe and Ito's, told apart by colour-blind people, each with a
word beside it) for light and dark pages alike. Nothing here is a link, a button or a name of the user's
unescaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from nbaccel.session.curves import Span, columns
from nbaccel.session.panel.ansi import ansi_to_html, plain
from nbaccel.session.panel.figures import clock, number, scaled, size
from nbaccel.session.panel.metrics import Chart, more_metrics
from nbaccel.session.panel.reading import PARTS, Row, View, scaling
from nbaccel.session.results import rank_ranges

__all__ = [
    "GOES_ON",
    "body",
    "document",
    "failure",
    "folder",
    "header",
    "output",
    "outputs_folded",
    "panel",
    "scrolling",
]

STATES = {
    "starting": ("#8c8c8c", "○"),
    "idle": ("#8c8c8c", "○"),
    "compiling": ("#e69f00", "◐"),
    "running": ("#3b8fd0", "●"),
    "waiting": ("#c77fa8", "◌"),
    "done": ("#009e73", "✓"),
    "failed": ("#d55e00", "✗"),
    "lost": ("#d55e00", "✗"),
    "stopped": ("#e69f00", "■"),
}
_PARTS = {
    "data": "#e69f00",
    "transfer": "#f0d048",
    "forward": "#56b4e9",
    "backward": "#2a78b8",
    "communication": "#c77fa8",
    "optimizer": "#009e73",
    "checkpoint": "#d55e00",
    "other": "#9a9a9a",
}
GOES_ON = "nbaccel-goes-on"
"""The class of the word that says so of a run, for a page that is cut off from it."""
_LINE = "#3b8fd0"
_BAND = "rgba(59,143,208,0.3)"
RULE = "border-top:1px solid rgba(128,128,128,0.25)"
# A blank line would end the HTML where a notebook is exported as Markdown.
_LINE_END = "&#10;"
_MONO = "font-family:monospace;font-size:12px;line-height:1.35"
MUTED = "opacity:0.7"
_ONE_LINE = "white-space:nowrap;overflow:hidden;text-overflow:ellipsis"
# Seconds: a rank is asked for a sign of life twice in one.
_SILENT = 5.0
_BESIDE = 2
_CHART_COLUMNS, _CHART_WIDTH, _CHART_HEIGHT = 60, 210, 54


def panel(view: View, *, error: Sequence[str] = (), outputs: Sequence[tuple[int, Sequence[str]]] = ()) -> str:
    """The whole panel, for a run that is over or is looked at from outside.

    Args:
        error: lines about the first failure, ANSI colours allowed; shown open.
        outputs: rank and its last lines; folded.
    """
    folded = outputs_folded(outputs)
    return _box(header(view) + body(view) + failure(error) + folded + folder(view))


def document(view: View, content: str) -> str:
    """`content`, a `panel`, as an HTML file of its own."""
    title = escape(f"{view.heading.name}: {view.situation}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width">'
        "<style>:root{color-scheme:light dark}body{font-family:system-ui,sans-serif;max-width:1100px;"
        f"margin:1.5em auto;padding:0 1em}}</style></head><body>\n{content}\n</body></html>\n"
    )


def _box(content: str) -> str:
    return f'<div style="font-size:13px;line-height:1.45;max-width:1100px">{content}</div>'


def header(view: View) -> str:
    """Name, state, times, and what dominates."""
    colour, sign = STATES[view.situation]
    heading = view.heading
    device = heading.device + (f" · {heading.precision}" if heading.precision not in (None, "no") else "")
    ranks = f"{view.num_ranks} rank{'s' if view.num_ranks != 1 else ''}"
    figures = [f"{ranks} · {escape(device)}", *filter(None, [heading.attempt]), clock(view.elapsed)]
    figures += filter(None, [escape(view.speed), scaling(view)])
    if view.left is not None:
        figures.append(f"{clock(view.left)} left")
    figures += filter(None, [view.as_of])
    goes_on = f' class="{GOES_ON}"' if view.at is not None else ""
    line = (
        f'<div style="display:flex;flex-wrap:wrap;gap:2px 14px;align-items:center">'
        f'<b style="font-size:14px">{escape(plain(heading.name))}</b>'
        f'<span{goes_on} style="color:{colour};font-weight:bold">{sign} {view.ending}</span>'
        f'<span style="{MUTED}">{" · ".join(figures)}</span></div>'
    )
    said = "".join(
        f'<div style="margin:3px 0 2px 0;padding:1px 8px;border-left:3px solid #e69f00">{escape(sentence)}</div>'
        for sentence in view.sentences
    )
    return line + said


def body(view: View) -> str:
    """Ranks, where their time goes, and curves; nothing for a run that only printed and is done."""
    told = view.charts or view.others or any(row.loop for row in view.rows)
    if view.situation == "done" and not told:
        return ""
    strip = _strip(view) if view.strip else ""
    shown = _columns(view)
    rows = "".join(_row(row, shown) for row in view.rows)
    table = f"{strip}{_captions(shown)}{rows}{_legend(view)}"
    words = escape(plain(more_metrics(view.others)))
    more = f'<div style="font-size:12px;{MUTED};overflow-wrap:anywhere">{words}</div>' if words else ""
    if not view.charts:
        return f'<div style="margin:4px 0">{table}{more}</div>'
    # few curves stand beside the table, where the page is wide enough
    width = f"1 1 {_CHART_WIDTH}px" if len(view.charts) <= _BESIDE else "1 1 100%"
    return (
        '<div style="display:flex;flex-wrap:wrap;gap:8px 24px;margin:4px 0">'
        f'<div style="flex:999 1 600px;min-width:0">{table}</div>'
        f'<div style="flex:{width}">{_charts(view.charts)}{more}</div></div>'
    )


def failure(lines: Sequence[str], *, headline: str = "") -> str:
    """The first failure: open, or folded below its `headline`."""
    if not lines:
        return ""
    text = ansi_to_html(headline) or _LINE_END.join(ansi_to_html(line) for line in lines)
    folded = output("traceback", lines) if headline and len(lines) > 1 else ""
    return (
        f'<div style="margin:6px 0;padding:4px 10px;border-left:4px solid #d55e00;overflow-x:auto">'
        f'<div style="{_MONO};white-space:pre-wrap;overflow-wrap:anywhere">{text}</div>{folded}</div>'
    )


def output(title: str, lines: Sequence[str], *, opened: bool = False) -> str:
    """Lines of a rank, folded unless `opened`."""
    text = _LINE_END.join(ansi_to_html(line) for line in lines)
    return (
        f'<details{" open" if opened else ""} style="margin:2px 0"><summary style="cursor:pointer;{MUTED}">'
        f'{escape(title)}</summary><div style="{_MONO};white-space:pre-wrap;overflow-wrap:anywhere;'
        f'max-height:320px;overflow-y:auto;padding:2px 10px">{text}</div></details>'
    )


def outputs_folded(outputs: Sequence[tuple[int, Sequence[str]]]) -> str:
    """What ranks printed last, one fold each, side by side while they are closed."""
    folds = "".join(output(f"output of rank {rank}", lines) for rank, lines in outputs if lines)
    return f'<div style="display:flex;flex-wrap:wrap;gap:0 18px">{folds}</div>' if folds else ""


def scrolling(lines: Sequence[str]) -> str:
    """What a rank printed last, in a box whose end is in view."""
    text = _LINE_END.join(ansi_to_html(line) for line in lines)
    return (
        '<div style="display:flex;flex-direction:column-reverse;max-height:260px;overflow-y:auto;'
        f'border-left:3px solid rgba(128,128,128,0.4);padding:2px 10px">'
        f'<div style="{_MONO};white-space:pre-wrap;overflow-wrap:anywhere">{text}</div></div>'
    )


def folder(view: View) -> str:
    """Where the run's files are."""
    if view.heading.folder is None:
        return ""
    path = escape(view.heading.folder)
    return (
        f'<div style="{MUTED};font-size:12px;overflow-wrap:anywhere">every rank’s full output: {path}</div>'
    )


# ── a row per rank ────────────────────────────────────────────────────────────────────────────────────


_WIDTHS = {"rank": 104, "latest": 110, "memory": 56, "device": 56, "step": 80}
# Where the page is wide, the bar's numbers have room to the last.
_PROGRESS = "flex:1 1 178px;max-width:260px;min-width:0"
_OUTPUT = "flex:1 1 70px;min-width:0"


def _columns(view: View) -> dict[str, str]:
    """The columns there is something to show in, with what stands above each. While the run goes on those that
    fill later have their place already, so that nothing jumps."""
    live = view.situation in ("starting", "running")
    loops = {row.loop for row in view.rows if row.loop}
    found: dict[str, str] = {}
    if live or loops:
        found["progress"] = plain(next(iter(loops))) if len(loops) == 1 else "progress"
    if any(row.metrics for row in view.rows):
        found["latest"] = "latest"
    if live or any(row.memory is not None for row in view.rows):
        found["memory"] = "memory"
    if any(row.device_memory is not None for row in view.rows):
        found["device"] = "GPU"
    if any(row.parts for row in view.rows):
        found["step"] = "each step"
    if live or any(row.words for row in view.rows):
        found["output"] = "last output"
    return found


def _captions(columns: Mapping[str, str]) -> str:
    """What stands above the columns; of what does not fit a narrow page, nothing."""
    names = {"rank": "rank", **columns}
    growing = {"progress": _PROGRESS, "output": _OUTPUT}
    cells = "".join(
        f'<div style="{growing[column]};{_ONE_LINE}">{escape(name)}</div>'
        if column in growing
        else cell(escape(name), _WIDTHS[column])
        for column, name in names.items()
    )
    style = f"display:flex;flex-wrap:wrap;gap:0 12px;height:16px;overflow:hidden;font-size:11px;{MUTED}"
    return f'<div style="{style}">{cells}</div>'


def _row(row: Row, columns: Mapping[str, str]) -> str:
    cells = [_state_cell(row)]
    if "progress" in columns:
        cells.append(bar_cell(row, named=columns["progress"] == "progress"))
    if "latest" in columns:
        values = [
            f'<span style="{MUTED}">{escape(plain(name))}</span> {number(value)}'
            for name, value in row.metrics[:2]
        ]
        cells.append(small_cell(values, _WIDTHS["latest"]))
    if "memory" in columns:
        cells.append(small_cell(_sizes(row.memory), _WIDTHS["memory"]))
    if "device" in columns:
        busy = [] if row.utilization is None else [f"{row.utilization} %"]
        cells.append(small_cell([*_sizes(row.device_memory), *busy], _WIDTHS["device"]))
    if "step" in columns:
        cells.append(_parts_cell(row.parts))
    if "output" in columns:
        words = f'<span style="{MUTED};{_MONO}">{ansi_to_html(row.words[:200])}</span>'
        if row.age is not None and row.age >= _SILENT:
            words = f"no sign of life for {clock(row.age)} {words}"
        cells.append(f'<div style="{_OUTPUT};{_ONE_LINE}">{words}</div>')
    style = f"display:flex;flex-wrap:wrap;gap:0 12px;align-items:center;padding:2px 0;{RULE}"
    return f'<div style="{style}">{"".join(cells)}</div>'


def _sizes(count: int | None) -> list[str]:
    return [] if count is None else [size(count)]


def cell(content: str, width: int) -> str:
    return f'<div style="width:{width}px;{_ONE_LINE}">{content}</div>'


def small_cell(lines: Sequence[str], width: int) -> str:
    """At most two lines in small letters."""
    content = "".join(f'<div style="{_ONE_LINE}">{line}</div>' for line in lines)
    return f'<div style="width:{width}px;font-size:12px;line-height:1.25">{content}</div>'


def _state_cell(row: Row) -> str:
    colour, sign = STATES[row.state]
    detail = f" {escape(plain(row.detail))}" if row.detail else ""
    return cell(
        f'<b>{row.rank}</b> <span style="color:{colour}">{sign}</span> {row.state}'
        f'<span style="{MUTED}">{detail}</span>',
        _WIDTHS["rank"],
    )


def bar_cell(row: Row, *, named: bool) -> str:
    """A bar with its numbers beneath it; as high when there is no loop yet, so that nothing jumps."""
    colour = STATES[row.state][0] if row.state in ("done", "failed", "lost") else _LINE
    share = 0.0 if row.fraction is None else row.fraction
    bar = (
        '<div style="height:6px;border-radius:3px;background-color:rgba(128,128,128,0.25);overflow:hidden">'
        f'<div style="width:{share:.1%};height:6px;background-color:{colour}"></div></div>'
    )
    words = "&nbsp;"
    if row.loop:
        parts = [f"{row.loop} {row.steps}" if named or not row.total else row.steps, *row.outer]
        parts += [f"epoch {row.epoch}"] if row.epoch is not None else []
        parts += ["".join(scaled(row.rate, row.divisor, 3)) + "/s"] if row.rate is not None else []
        parts += [clock(row.left)] if row.left else []
        words = escape(plain(" · ".join(parts)))
    return (
        f'<div style="{_PROGRESS}">{bar}<div style="font-size:11px;{MUTED};{_ONE_LINE}">{words}</div></div>'
    )


def _parts_cell(parts: Iterable[tuple[str, float]]) -> str:
    boxes = "".join(
        f'<div style="width:{share:.1%};height:12px;background-color:{_PARTS[name]}"></div>'
        for name, share in parts
    )
    return f'<div style="width:80px;display:flex;border-radius:2px;overflow:hidden">{boxes}</div>'


def _legend(view: View) -> str:
    """The colours of the parts, with the mean share of each."""
    shares: dict[str, float] = {}
    holders = [row for row in view.rows if row.parts]
    for row in holders:
        for name, share in row.parts:
            shares[name] = shares.get(name, 0.0) + share / len(holders)
    words = "".join(
        f'<span>{_swatch(_PARTS[name])} <span style="{MUTED}">{name} {shares[name]:.0%}</span></span>'
        for name in PARTS
        if shares.get(name, 0.0) >= 0.01
    )
    if not words:
        return ""
    style = "display:flex;flex-wrap:wrap;gap:0 10px;font-size:11px;padding:2px 0"
    return f'<div style="{style}"><span style="{MUTED}">each step:</span>{words}</div>'


def _swatch(colour: str) -> str:
    """A small box in the very colour of the bars, which muted text would dim."""
    style = f"display:inline-block;width:9px;height:9px;border-radius:2px;background-color:{colour}"
    return f'<span style="{style}"></span>'


# ── many ranks ────────────────────────────────────────────────────────────────────────────────────────


def _strip(view: View) -> str:
    """A box for each rank: its state by colour, how fast it is by how full the colour is."""
    boxes = "".join(
        f'<i style="width:12px;height:12px;background-color:{STATES[state][0]};'
        f'opacity:{0.25 + 0.75 * speed**2:.2f}"></i>'
        for _, state, speed in view.strip
    )
    words = ", ".join(
        f'<span style="color:{STATES[state][0]}">{STATES[state][1]}</span> {len(ranks)} {state}'
        + (f" ({rank_ranges(ranks)})" if len(ranks) < view.num_ranks / 4 else "")
        for state, ranks in view.states.items()
    )
    return (
        f'<div style="display:flex;flex-wrap:wrap;gap:2px;max-width:448px">{boxes}</div>'
        f'<div style="font-size:12px;{MUTED}">{words}; paler is slower</div>'
    )


# ── curves ────────────────────────────────────────────────────────────────────────────────────────────


def _charts(charts: Sequence[Chart]) -> str:
    drawn = "".join(_chart(chart) for chart in charts)
    return f'<div style="display:flex;flex-wrap:wrap;gap:8px 18px">{drawn}</div>'


def _chart(chart: Chart) -> str:
    spans = columns(chart.curves, _CHART_COLUMNS)
    if not spans:
        return ""
    low, high = min(span.low for span in spans), max(span.high for span in spans)
    title = (
        f'<div style="{_ONE_LINE}"><b>{escape(plain(chart.name))}</b> {number(chart.last)}'
        f'<span style="{MUTED}"> · {chart.when}</span></div>'
    )
    band = len(chart.curves) > 1
    boxes = "".join(_column(span, low, high, band=band) for span in spans)
    frame = (
        f'<div style="display:flex;align-items:flex-end;height:{_CHART_HEIGHT}px;'
        f'border-left:1px solid rgba(128,128,128,0.5);border-bottom:1px solid rgba(128,128,128,0.5)">{boxes}</div>'
    )
    named, count = f"ranks {rank_ranges(chart.ranks)}", len(chart.ranks)
    many = f"{count} ranks" if count == chart.num_ranks else f"{count} of {chart.num_ranks} ranks"
    whose = f" · {named if len(named) < 16 else many}" if count > 1 else ""
    scale = f'<div style="font-size:11px;{MUTED}">{number(low)} to {number(high)}{whose}</div>'
    return f'<div style="width:{_CHART_WIDTH}px">{title}{frame}{scale}</div>'


def _column(span: Span, low: float, high: float, *, band: bool) -> str:
    """A line's part; of lines that lie apart their mean, in the band they fill."""
    scale = (_CHART_HEIGHT - 4) / (high - low) if high > low and math.isfinite(high - low) else 0.0
    bottom = round((span.low - low) * scale)
    height = max(2, round((span.high - span.low) * scale))
    place = f"width:{100 / _CHART_COLUMNS:.2f}%;height:{height}px;margin-bottom:{bottom}px"
    if not band or height < 5:
        return f'<i style="{place};background-color:{_LINE}"></i>'
    top = min(height - 2, max(0, round((span.high - span.mean) * scale) - 1))
    line = f'<b style="display:block;height:2px;background-color:{_LINE}"></b>'
    return (
        f'<i style="{place};background-color:{_BAND}"><i style="display:block;height:{top}px"></i>{line}</i>'
    )

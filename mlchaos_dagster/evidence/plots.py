"""THE picture of a run: one time axis, small multiples, bands for the phases, named marks.

matplotlib is imported when a picture is drawn and used without pyplot (no global figures, no display).
SVG keeps its text as text and its colours as CSS variables: it follows the reader's light or dark page.
"""

# matplotlib and numpy type parts of themselves as unknown; what is ours is still checked.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlchaos_dagster.domain.record import RunRecord, Samples, Verdict
from mlchaos_dagster.evidence.layout import Band, Mark, bands_of, marks_of, origin_of, rows_of
from mlchaos_dagster.evidence.palette import DARK, LIGHT, variables, with_variables
from mlchaos_dagster.evidence.panels import Panel, X, panels_of
from mlchaos_dagster.evidence.series import blind_spans, extent, first_bad

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH_IN = 10.0
_LEFT_IN, _RIGHT_IN = 0.78, 1.12
_GAP_IN, _BOTTOM_IN, _TOP_IN = 0.34, 0.52, 0.06
_ROW_IN, _BAND_IN = 0.165, 0.24
_CHAR_IN = 0.072
"""Width of a character of the labels (8 pt DejaVu Sans), a little generous."""
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "hatch.linewidth": 0.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "mlchaos",
    "text.parse_math": False,
}
"""DejaVu Sans comes with matplotlib; a reader's browser without it takes Verdana, which has the same widths."""
_MARK_COLOURS = {"fault": "ink", "bad": "bad", "good": "good"}
_MARK_STYLES: dict[str, Any] = {"fault": "-", "bad": (0, (1.5, 1.5)), "good": (0, (5, 2))}
PNG_LIMIT_BYTES = 150_000
"""Dagster keeps metadata in its event log; a larger picture makes its pages slow."""


def picture_svg(record: RunRecord, samples: Samples, verdict: Verdict) -> str:
    """The picture as one `<svg>` element, without prolog, fonts or references to anything outside."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        figure = _draw(record, samples, verdict)
        canvas = FigureCanvasSVG(figure)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.print_svg(out, metadata=nothing)
    svg = out.getvalue()
    svg = with_variables(svg[svg.index("<svg") :])
    svg = svg.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Width and height in points would overrule the page; the viewBox alone scales. The label is for screen readers.
    head, body = svg.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    label = f"{record.experiment.name}: measurements before, during and after the fault"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" class="mc-picture" '
        f'role="img" aria-label="{label}" {view[0] if view else ""}'
    )
    style = (
        f"<style>svg.mc-picture {{ {variables(LIGHT)} }} "
        f"@media (prefers-color-scheme: dark) {{ svg.mc-picture {{ {variables(DARK)} }} }}</style>"
    )
    return f"{head}>{style}{body}".strip()


def picture_png(record: RunRecord, samples: Samples, verdict: Verdict, width_px: int = 1000) -> bytes:
    """The picture on a white card, at most `PNG_LIMIT_BYTES`."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    with matplotlib.rc_context(_STYLE):
        figure = _draw(record, samples, verdict)
        figure.patch.set_facecolor(LIGHT["paper"])
        while True:
            figure.set_dpi(width_px / _WIDTH_IN)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            image = Image.frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")
            out = io.BytesIO()
            # 64 colours are enough for flat areas and antialiased text, and a third of the size.
            image.quantize(64, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
                out, "PNG", optimize=True
            )
            if out.tell() <= PNG_LIMIT_BYTES or width_px <= 300:
                return out.getvalue()
            width_px = int(width_px * 0.8)


@dataclass(frozen=True)
class _Geometry:
    """Inches → fractions of the figure, and seconds → fractions."""

    height_in: float
    x0: float
    x1: float

    def x(self, t: float) -> float:
        left, right = _LEFT_IN / _WIDTH_IN, 1 - _RIGHT_IN / _WIDTH_IN
        return left + (t - self.x0) / (self.x1 - self.x0) * (right - left)

    def y(self, inches_from_top: float) -> float:
        return 1 - inches_from_top / self.height_in


def _draw(record: RunRecord, samples: Samples, verdict: Verdict) -> Figure:
    from matplotlib.figure import Figure

    span = extent(record, samples)
    zero = origin_of(record)
    scale, unit = (60.0, "minutes") if span.length > 600 else (1.0, "seconds")
    margin = 0.012 * span.length
    axis = X(zero, scale, span.start - margin, span.end + margin)
    panels = panels_of(record, samples, verdict, span)
    marks = marks_of(record, verdict, first_bad(record, samples) if verdict.held is False else None)
    bands = bands_of(record, span.end)

    plot_in = _WIDTH_IN - _LEFT_IN - _RIGHT_IN
    starts = [(m.t - axis.start) / (axis.end - axis.start) * plot_in for m in marks]
    rows = rows_of(starts, [len(m.label) * _CHAR_IN for m in marks], gap=0.1)
    strip_in = _TOP_IN + (_BAND_IN if bands else 0) + (max(rows, default=-1) + 1) * _ROW_IN
    height = strip_in + sum(_GAP_IN + p.height_in for p in panels) + _BOTTOM_IN
    figure = Figure(figsize=(_WIDTH_IN, height), dpi=72, facecolor="none")
    geometry = _Geometry(height, axis.start, axis.end)

    top = strip_in
    drawn: list[Any] = []
    stretches: list[tuple[float, float]] = []
    for panel in panels:
        top += _GAP_IN
        bottom_in = top + panel.height_in
        left, width = _LEFT_IN / _WIDTH_IN, plot_in / _WIDTH_IN
        axes = figure.add_axes((left, geometry.y(bottom_in), width, panel.height_in / height))
        _style(axes, panel, axis)
        panel.draw(axes, axis)
        _titles(figure, panel, geometry, top)
        drawn.append(axes)
        stretches.append((top, bottom_in))
        top = bottom_in
    if drawn and panels[-1].timed:
        since = "the injection" if record.moment("injected") is not None else "the window's start"
        if not record.window:
            since = "the end of the baseline" if record.baseline else "the start"
        drawn[-1].tick_params(labelbottom=True)
        drawn[-1].set_xlabel(f"{unit} since {since}", color=LIGHT["muted"], fontsize=8)
    _bands(figure, bands, geometry, top)
    _blind(figure, record, samples, geometry, strip_in, top)
    _marks(figure, list(zip(marks, rows, strict=True)), geometry, strip_in, stretches)
    return figure


def _style(axes: Any, panel: Panel, axis: X) -> None:
    axes.patch.set_alpha(0)
    axes.set_xlim(axis(axis.start), axis(axis.end))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LIGHT["muted"])
    axes.tick_params(colors=LIGHT["muted"], labelsize=8, length=2.5, labelbottom=False)
    if panel.grid:
        axes.grid(axis="y", color=LIGHT["faint"], linewidth=0.6)
    axes.set_axisbelow(True)


def _titles(figure: Figure, panel: Panel, geometry: _Geometry, top_in: float) -> None:
    y = geometry.y(top_in - 0.07)
    x = geometry.x(geometry.x0)
    figure.text(x, y, panel.title, fontsize=9, fontweight="bold", color=LIGHT["ink"])
    x += (len(panel.title) * 0.088 + 0.12) / _WIDTH_IN
    for text, colour in panel.legend:
        if colour:
            swatch = _rectangle(x, y, 0.11 / _WIDTH_IN, 0.09 / geometry.height_in, LIGHT[colour], zorder=3)
            if colour == "error":
                swatch.set_hatch("//////")
                swatch.set_edgecolor(LIGHT["paper"])
                swatch.set_linewidth(0)
            figure.add_artist(swatch)
            x += 0.16 / _WIDTH_IN
        figure.text(x, y, text, fontsize=8, color=LIGHT["muted"])
        x += (len(text) * _CHAR_IN + 0.14) / _WIDTH_IN
    if panel.summary:
        right = geometry.x(geometry.x1)
        figure.text(right, y, panel.summary, fontsize=8, color=LIGHT["ink"], ha="right")


def _bands(figure: Figure, bands: list[Band], geometry: _Geometry, bottom_in: float) -> None:
    for band in bands:
        x0, x1 = geometry.x(band.span.start), geometry.x(band.span.end)
        y0, y1 = geometry.y(bottom_in), geometry.y(_TOP_IN)
        figure.add_artist(_rectangle(x0, y0, x1 - x0, y1 - y0, LIGHT[band.kind], zorder=-2))
        label = band.label_that_fits((x1 - x0) * _WIDTH_IN - 0.08, _CHAR_IN)
        if label:
            y = geometry.y(_TOP_IN + 0.165)
            figure.text((x0 + x1) / 2, y, label, fontsize=8, ha="center", color=LIGHT["ink"], style="italic")


def _blind(
    figure: Figure, record: RunRecord, samples: Samples, geometry: _Geometry, top_in: float, bottom_in: float
) -> None:
    for gap in blind_spans(record, samples):
        x0 = geometry.x(max(gap.start, geometry.x0))
        x1 = geometry.x(min(gap.end, geometry.x1))
        y0, y1 = geometry.y(bottom_in), geometry.y(top_in)
        hatched = _rectangle(x0, y0, x1 - x0, y1 - y0, "none", zorder=-1)
        hatched.set(hatch="////", edgecolor=LIGHT["blind"], linewidth=0)
        figure.add_artist(hatched)
        if (x1 - x0) * _WIDTH_IN > 0.2:
            figure.text(
                (x0 + x1) / 2, (y0 + y1) / 2, "not measured", rotation=90, fontsize=8, ha="center", va="center",
                color=LIGHT["ink"],
                bbox={"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 2, "alpha": 0.85},
            )  # fmt: skip


def _marks(
    figure: Figure,
    marks: list[tuple[Mark, int]],
    geometry: _Geometry,
    strip_in: float,
    stretches: list[tuple[float, float]],
) -> None:
    """Lines through all panels, faint between them where they would strike out the titles."""
    from matplotlib.lines import Line2D

    for mark, row in marks:
        x = geometry.x(mark.t)
        y = geometry.y(strip_in - (row + 0.2) * _ROW_IN)
        colour = LIGHT[_MARK_COLOURS[mark.kind]]
        whole = (strip_in - (row + 0.75) * _ROW_IN, stretches[-1][1])
        for top, bottom, alpha in [(*whole, 0.3), (whole[0], strip_in, 1.0), *((a, b, 1.0) for a, b in stretches)]:
            line = Line2D(
                [x, x], [geometry.y(bottom), geometry.y(top)], color=colour, linewidth=0.9, alpha=alpha,
                linestyle=_MARK_STYLES[mark.kind], transform=figure.transSubfigure, zorder=0.5,
            )  # fmt: skip
            figure.add_artist(line)
        figure.text(x + 0.04 / _WIDTH_IN, y, mark.label, fontsize=8, color=colour, zorder=5)


def _rectangle(x: float, y: float, width: float, height: float, colour: str, zorder: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=colour, edgecolor="none", linewidth=0, zorder=zorder)

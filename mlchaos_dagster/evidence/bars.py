"""Recovery as horizontal bars: one part a line, on one scale of seconds, censored parts hatched and open to the right.

Plain SVG text; no library, because four bars need none. Everything in it is a number or a fixed word.
"""

from __future__ import annotations

from mlchaos_dagster.domain.record import RecoveryResult
from mlchaos_dagster.domain.units import show_duration

_WIDTH, _LEFT, _RIGHT, _ROW, _BAR = 860, 250, 150, 30, 16
_PARTS = (
    ("detect", "detect", "cache"),
    ("reschedule", "a replacement runs", "model"),
    ("ready", "as many ready as before", "model"),
    ("steady", "steady: every objective holds", "good"),
)


def recovery_svg(recovery: RecoveryResult) -> str:
    """One `<svg>` element with CSS variables of `palette`; empty when nothing was measured."""
    parts = [
        (name, label, colour, value)
        for name, label, colour in _PARTS
        if (value := getattr(recovery, f"{name}_s")) is not None
    ]
    if not parts:
        return ""
    longest = max([value for *_, value in parts] + [0.1])
    within = recovery.within_s
    near = 0 < within <= 3 * longest
    top_s = max(longest, within if near else 0.0) * 1.04
    plot = _WIDTH - _LEFT - _RIGHT
    height = _ROW * len(parts) + 34

    def x(seconds: float) -> float:
        return _LEFT + plot * seconds / top_s

    out = [
        f'<svg class="recovery" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="recovery, part by part">',
        '<defs><pattern id="censored" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="7" height="7" fill="var(--mc-paper)"/>'
        '<rect width="3" height="7" fill="var(--mc-blind)"/></pattern></defs>',
    ]
    for i, (name, label, colour, value) in enumerate(parts):
        y = 8 + i * _ROW
        open_end = name in recovery.censored
        fill = "url(#censored)" if open_end else f"var(--mc-{colour})"
        length = max(2.0, x(value) - _LEFT)
        shown = f"&gt; {show_duration(value)} (not seen)" if open_end else show_duration(value)
        out.append(f'<text x="{_LEFT - 10}" y="{y + 13}" text-anchor="end">{label}</text>')
        out.append(
            f'<rect x="{_LEFT}" y="{y}" width="{length:.1f}" height="{_BAR}" fill="{fill}" '
            f'stroke="var(--mc-{"blind" if open_end else colour})"/>'
        )
        out.append(f'<text class="value" x="{_LEFT + length + 8:.1f}" y="{y + 13}">{shown}</text>')
    foot = 8 + len(parts) * _ROW
    out.append(f'<line x1="{_LEFT}" y1="4" x2="{_LEFT}" y2="{foot}" stroke="var(--mc-muted)"/>')
    if near:
        out.append(
            f'<line x1="{x(within):.1f}" y1="4" x2="{x(within):.1f}" y2="{foot}" stroke="var(--mc-slo)" '
            'stroke-width="1.5" stroke-dasharray="6 3"/>'
        )
        out.append(
            f'<text class="limit" x="{x(within):.1f}" y="{foot + 16}" text-anchor="middle">limit {show_duration(within)}</text>'
        )
    elif within:
        out.append(
            f'<text class="limit" x="{_WIDTH - _RIGHT}" y="{foot + 16}" text-anchor="end">limit {show_duration(within)} →</text>'
        )
    out.append("</svg>")
    return "".join(out)

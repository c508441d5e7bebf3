"""Colours of pictures and reports, light and dark.

Blue, yellow and red after Paul Tol's high-contrast schemes: told apart by all common forms of colour blindness
and in grey. Colour never alone carries meaning: failures are also hatched, marks also named.
"""

from __future__ import annotations

LIGHT = {
    "ink": "#1c2024",
    "muted": "#5f6773",
    "faint": "#d5d9df",
    "paper": "#fefefe",
    "baseline": "#f1f3f6",
    "fault": "#fbe6d3",
    "recovery": "#dcefe8",
    "blind": "#8c939d",
    "model": "#3b6ea5",
    "cache": "#ddaa33",
    "error": "#bb5566",
    "good": "#117755",
    "bad": "#a3282c",
    "slo": "#6f3fa0",
}
"""Every value is used for one thing only: in SVG each is replaced by its CSS variable."""

DARK = {
    "ink": "#e8eaed",
    "muted": "#a3abb6",
    "faint": "#3a414b",
    "paper": "#14171b",
    "baseline": "#1d2126",
    "fault": "#3b2a1b",
    "recovery": "#17322a",
    "blind": "#868e99",
    "model": "#6699cc",
    "cache": "#eecc66",
    "error": "#ee99aa",
    "good": "#5fcfa4",
    "bad": "#ff8a84",
    "slo": "#c4a1f0",
}


def variables(colours: dict[str, str]) -> str:
    """The CSS custom properties `--mc-NAME`."""
    return " ".join(f"--mc-{name}: {value};" for name, value in colours.items())


def with_variables(svg: str) -> str:
    """`svg` with every colour of `LIGHT` replaced by its variable, the colour itself as fallback."""
    for name, value in LIGHT.items():
        svg = svg.replace(value, f"var(--mc-{name}, {value})")
    return svg

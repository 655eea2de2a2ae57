"""Heat maps and lines as inline SVG.

Colours are CSS variables and classes of the page, so that they follow the reader's light or dark theme.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape

from ..maths import DEAD_THRESHOLD


STEPS = 8  # colours on each side of the neutral one
LOAD_RANGE = 2.0  # powers of two from the neutral colour to the last one, for loads
ROOM = 40  # characters of the name of a row
NUMBERED = 16  # so many experts have their values written into the cells


def colour_steps(dark: bool) -> dict[int, str]:
    """The diverging colours from `-STEPS` (idle) over 0 (fair share) to `STEPS` (crowded), as hex codes."""
    ends = ((88, 166, 255), (43, 48, 56), (255, 123, 84)) if dark else ((23, 92, 168), (240, 241, 243), (190, 38, 32))
    colours = {}
    for step in range(-STEPS, STEPS + 1):
        share, end = (abs(step) / STEPS) ** 0.85, ends[0] if step < 0 else ends[2]
        mixed = [round(middle + share * (last - middle)) for middle, last in zip(ends[1], end)]
        colours[step] = "#{:02x}{:02x}{:02x}".format(*mixed)
    return colours


def colour_step(value: float, reach: float = LOAD_RANGE) -> int:
    """Step of the colours for a value relative to what is fair: powers of two, `2**reach` being the last."""
    return -STEPS if value <= 0 else round(max(-1.0, min(1.0, math.log2(value) / reach)) * STEPS)


def _class(step: int) -> str:
    return f"h{step + STEPS}"


def heat_svg(
    rows: Sequence[Sequence[float | None]],
    labels: Sequence[str],
    what: str,
    reach: float = LOAD_RANGE,
    cross_dead: bool = False,
    caption: str = "",
) -> str:
    """
    A heat map as inline SVG: one row per label, one column per expert.

    Args:
        rows (`Sequence[Sequence[float | None]]`): Values relative to 1, which is neutral; `None` is left blank. Rows may be
            of unequal length.
        labels (`Sequence[str]`): Names of the rows.
        what (`str`): What the values are, for the text under the pointer.
        reach (`float`, *optional*, defaults to `2.0`): Powers of two from the neutral colour to the last one.
        cross_dead (`bool`, *optional*, defaults to `False`): Whether dead experts are crossed out.
        caption (`str`, *optional*): Description for those who cannot see it.
    """
    columns = max(map(len, rows))
    numbered = columns <= NUMBERED
    width, height = 38.0 if numbered else max(5.0, min(22.0, 880 / columns)), 22 if numbered else 16
    left = 12 + 6.6 * min(max(map(len, labels)), ROOM)
    cells: dict[str, list[str]] = {}
    crosses, numbers = [], []
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            step = 0 if value is None else colour_step(value, reach)
            cells.setdefault("blank" if value is None else _class(step), []).append(f"M{x} {y}h1v1h-1z")
            if numbered and value is not None:
                place = f'x="{left + (x + 0.5) * width:.1f}" y="{(y + 0.5) * height + 4:.1f}"'
                numbers.append(
                    f'<text {place} class="mid {"on" if abs(step) > STEPS / 2 else "in"}">{value:.2f}</text>'
                )
            if cross_dead and value is not None and value < DEAD_THRESHOLD:
                crosses.append(f"M{x + 0.25:g} {y + 0.2:g}l.5 .6m0-.6l-.5 .6")
    every = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if step * width >= 24)
    parts = [
        f'<svg class="heat" role="img" aria-label="{escape(caption or what)}" '
        f'viewBox="0 0 {left + columns * width + 4:.1f} {len(rows) * height + 20}" '
        f'style="width:{left + columns * width + 4:.0f}px" data-left="{left:.1f}" data-w="{width:.4f}" '
        f'data-h="{height}" data-what="{escape(what)}" data-labels="{escape(json.dumps(list(labels)))}" '
        f'data-rows="{escape(json.dumps([[None if v is None else round(v, 3) for v in row] for row in rows]))}">'
    ]
    for y, label in enumerate(labels):
        parts.append(
            f'<text x="{left - 6:.1f}" y="{(y + 0.5) * height + 4:.1f}" class="end">{escape(_short(label, ROOM))}</text>'
        )
    for x in range(0, columns, every):
        parts.append(f'<text x="{left + (x + 0.5) * width:.1f}" y="{len(rows) * height + 14}" class="mid">{x}</text>')
    parts.append(f'<g transform="translate({left:.1f} 0) scale({width:.4f} {height})">')
    parts += [f'<path class="{name}" d="{"".join(d)}"/>' for name, d in sorted(cells.items())]
    if crosses:
        parts.append(f'<path class="cross" d="{"".join(crosses)}"/>')
    return "".join([*parts, "</g>", *numbers, "</svg>"])


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def legend_svg(least: str, less: str, more: str, most: str) -> str:
    """The colours of the heat maps with the values of the ends and of half the way there."""
    parts = ['<svg class="legend" viewBox="0 0 270 30" style="width:270px" role="img" aria-label="colour scale">']
    width = 230 / (2 * STEPS + 1)
    for step in range(-STEPS, STEPS + 1):
        x = 20 + (step + STEPS) * width
        parts.append(f'<rect class="{_class(step)}" x="{x:.1f}" y="0" width="{width + 0.3:.1f}" height="12"/>')
    for text, place in ((least, -STEPS), (less, -STEPS / 2), ("1×", 0), (more, STEPS / 2), (most, STEPS)):
        parts.append(f'<text class="mid" x="{20 + (place + STEPS + 0.5) * width:.1f}" y="26">{text}</text>')
    return "".join([*parts, "</svg>"])


def lines_svg(
    series: Mapping[str, Sequence[float]],
    labels: Sequence[str],
    what: str,
    bound: tuple[str, Sequence[float]] | None = None,
) -> str:
    """
    Lines over the layers as inline SVG, with a legend.

    Args:
        series (`Mapping[str, Sequence[float]]`): Values of each layer by the name of the line.
        labels (`Sequence[str]`): Names of the layers.
        what (`str`): What the values are.
        bound (`tuple[str, Sequence[float]]`, *optional*): Name and values of a line that is drawn dashed.
    """
    left, right, top, height = 52, 180, 26, 190
    count = len(labels)
    width = min(640, max(220, 46 * count))
    lines = [*series.items(), *([bound] if bound else [])]
    ticks = nice_ticks(max(max(values) for _, values in lines))

    def place(index: int, value: float) -> tuple[float, float]:
        x = left + (width * (index + 0.5) / count)
        return round(x, 1), round(top + height * (1 - value / ticks[-1]), 1)

    parts = [
        f'<svg class="lines" role="img" aria-label="{escape(what)}" viewBox="0 0 {left + width + right} {top + height + 36}" '
        f'style="width:{left + width + right}px"><text x="{left - 6}" y="13" class="head">{escape(what)}</text>'
    ]
    for tick in ticks:
        y = place(0, tick)[1]
        parts.append(
            f'<path class="grid" d="M{left} {y}h{width}"/><text x="{left - 7}" y="{y + 4}" class="end">{tick:g}</text>'
        )
    every = max(1, math.ceil(count * 44 / width))
    for index in range(0, count, every):
        text = labels[index].removeprefix("layer ") if every > 1 or count > 12 else labels[index]
        parts.append(f'<text x="{place(index, 0)[0]}" y="{top + height + 16}" class="mid">{escape(text)}</text>')
    for number, (name, values) in enumerate(lines):
        kind = "bound" if number == len(series) else f"s{number % 8}"
        points = [place(index, value) for index, value in enumerate(values)]
        parts.append(f'<polyline class="{kind}" points="{" ".join(f"{x},{y}" for x, y in points)}"/>')
        if number < len(series):
            parts += [
                f'<circle class="{kind}" cx="{x}" cy="{y}" r="3"><title>{escape(f"{name}, {label}: {value:.4f}")}</title></circle>'
                for (x, y), label, value in zip(points, labels, values)
            ]
        y = top + 8 + 18 * number
        parts.append(
            f'<path class="{kind} key" d="M{left + width + 14} {y}h20"/><text x="{left + width + 40}" y="{y + 4}">{escape(_short(name, 20))}</text>'
        )
    return "".join([*parts, "</svg>"])


def nice_ticks(highest: float, count: int = 4) -> list[float]:
    """Round numbers from 0 to at least `highest`."""
    if not highest > 0:
        return [0.0, 1.0]
    rough = highest / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [round(index * step, 12) for index in range(math.ceil(highest / step - 1e-9) + 1)]

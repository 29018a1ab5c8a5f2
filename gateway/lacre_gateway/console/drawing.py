"""Lines over the last 24 hours, as SVG made here. Colours are classes of the style sheet, which knows light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from markupsafe import Markup

WIDTH: Final = 720
HEIGHT: Final = 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 20
STEP: Final = 5  # minutes of one point: the drawing has not many more pixels
SPAN: Final = 1440  # minutes


@dataclass(frozen=True, slots=True)
class DrawnLine:
    """name: for the legend. values: by minute since the epoch. whole: whether a point is the sum of its minutes, per minute;
    else it is their highest.
    """

    name: str
    values: Sequence[tuple[int, float | None]]
    whole: bool = True


def draw(lines: Sequence[DrawnLine], now: int, title: str, unit: str) -> Markup:
    """now: in minutes since the epoch. title: for those who do not see it."""
    begin = now - SPAN
    points = [(line.name, _points(line, begin)) for line in lines]
    top = _nice(max((value for _, line in points for _, value in line), default=0.0))
    parts = [_grid(top, unit), _hours(begin, now)]
    said = []
    for number, (name, line) in enumerate(points):
        parts += [_path(part, top, number) for part in _unbroken(line)]
        last = line[-1][1] if line else 0.0
        said.append(f"{name}: highest {_short(max((v for _, v in line), default=0.0))}, last {_short(last)}")
    label = Markup("{}, last 24 hours, {}. {}.").format(title, unit, "; ".join(said))
    head = Markup('<svg class="drawing" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, label)
    return head + Markup("").join(parts) + Markup("</svg>")


def _points(line: DrawnLine, begin: int) -> list[tuple[int, float]]:
    """By step since the beginning; steps without a value are missing."""
    found: dict[int, list[float]] = {}
    for at, value in line.values:
        if value is not None and begin <= at:
            found.setdefault((at - begin) // STEP, []).append(value)
    return [(step, sum(each) / len(each) if line.whole else max(each)) for step, each in sorted(found.items())]


def _unbroken(points: Sequence[tuple[int, float]]) -> list[list[tuple[int, float]]]:
    parts: list[list[tuple[int, float]]] = []
    for point in points:
        if parts and point[0] - parts[-1][-1][0] == 1:
            parts[-1].append(point)
        else:
            parts.append([point])
    return parts


def _x(step: float) -> float:
    return round(_LEFT + (WIDTH - _LEFT - _RIGHT) * step * STEP / SPAN, 1)


def _y(value: float, top: float) -> float:
    return round(HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * min(value, top) / top, 1)


def _path(points: Sequence[tuple[int, float]], top: float, number: int) -> Markup:
    if len(points) == 1:
        step, value = points[0]
        return Markup('<circle class="dot line-{}" cx="{}" cy="{}" r="1.6"/>').format(number, _x(step), _y(value, top))
    where = " ".join(f"{_x(step)},{_y(value, top)}" for step, value in points)
    line = Markup('<polyline class="line line-{}" points="{}"/>').format(number, where)
    if number:
        return line
    foot = HEIGHT - _BOTTOM
    area = f"{_x(points[0][0])},{foot} {where} {_x(points[-1][0])},{foot}"
    return Markup('<polygon class="area" points="{}"/>').format(area) + line


def _grid(top: float, unit: str) -> Markup:
    rows = Markup("")
    for share in (0.0, 0.5, 1.0):
        y = _y(top * share, top)
        rows += Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(_LEFT, WIDTH - _RIGHT, y, y)
        rows += Markup('<text class="scale" x="{}" y="{}" text-anchor="end">{}</text>').format(
            _LEFT - 6, y + 3.5, _short(top * share)
        )
    return rows + Markup('<text class="scale unit" x="{}" y="{}">{}</text>').format(_LEFT + 4, _TOP + 8, unit)


def _hours(begin: int, now: int) -> Markup:
    marks = Markup("")
    first = -(-begin // 240) * 240
    for at in range(first, now + 1, 240):
        text = datetime.fromtimestamp(at * 60, UTC).strftime("%H:%M")
        x = _x((at - begin) / STEP)
        marks += Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            x, x, HEIGHT - _BOTTOM, HEIGHT - _BOTTOM + 4
        )
        anchor = "end" if x > WIDTH - 30 else "start" if x < _LEFT + 14 else "middle"
        marks += Markup('<text class="scale" x="{}" y="{}" text-anchor="{}">{}</text>').format(x, HEIGHT - 5, anchor, text)
    return marks


def _nice(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    if value <= 1:
        return 1.0
    power = 1.0
    while True:
        for each in (1, 2, 5):
            if value <= each * power:
                return each * power
        power *= 10


def _short(value: float) -> str:
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{sign}"
    return f"{value:.3g}"

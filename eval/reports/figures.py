"""Pictures and charts of a report, each as self-contained HTML: colour maps, legends, line charts.

Depth is coloured by its logarithm, near is bright: equal steps of colour are equal ratios of distance, so that a table
top and a street both show their shape. Maps that are shown side by side share one range, given in their legend.
Charts take their colours from the page's CSS variables, so that they follow its light and dark themes.

Shapes: H, W. Images are (H,W,3) uint8, maps (H,W) float32 with a (H,W) bool mask of what may be shown.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

BINS = 20
"""Bars of a histogram."""
SIDE = 288
"""Pictures are shown with at most this many pixels on the longer side."""

INVALID = (128, 128, 134)
"""The grey of pixels without a value; no ramp contains it."""

NEARNESS = ((6, 6, 30), (53, 15, 92), (120, 28, 109), (188, 55, 84), (237, 105, 37), (251, 173, 50), (250, 244, 173))
ERROR = ((252, 250, 244), (253, 214, 155), (250, 148, 90), (222, 68, 50), (140, 10, 30), (52, 0, 12))
"""Colours from the low to the high end of a scale, evenly spaced; both rise or fall steadily in brightness."""

Ramp = Sequence[tuple[int, int, int]]


# --- pictures ---------------------------------------------------------------------------------------------------------


def _colours(ramp: Ramp, count: int) -> np.ndarray:
    """(count,3) uint8."""
    at = np.linspace(0, len(ramp) - 1, count)
    columns = [np.interp(at, np.arange(len(ramp)), [colour[c] for colour in ramp]) for c in range(3)]
    return np.stack(columns, axis=-1).round().astype(np.uint8)


def colourise(position: np.ndarray, valid: np.ndarray, ramp: Ramp) -> np.ndarray:
    """(H,W,3) uint8 of positions on a ramp (0 low end, 1 high end, clipped); grey where not valid or not finite."""
    shown = valid & np.isfinite(position)
    index = (np.clip(np.where(shown, position, 0.0), 0.0, 1.0) * 254).round().astype(np.intp)
    return np.where(shown[..., None], _colours(ramp, 255)[index], np.array(INVALID, np.uint8))


def nearness(depth: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    """Positions on NEARNESS of depths in metres: 1 at the near end of `span`, 0 at its far end."""
    near, far = span
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(far / depth) / np.log(far / near)


def depth_span(depth: np.ndarray, valid: np.ndarray) -> tuple[float, float]:
    """The near and far end that show a depth map well: its 2nd and 98th percentile, at least 5 % apart."""
    values = depth[valid & np.isfinite(depth) & (depth > 0)]
    if not len(values):
        return 1.0, 2.0
    near, far = (float(v) for v in np.percentile(values, [2, 98]))
    return near, max(far, near * 1.05)


def own_range(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Positions 0..1 between the 2nd and 98th percentile of the map itself, for maps whose scale means nothing."""
    usable = values[valid & np.isfinite(values)]
    low, high = (float(v) for v in np.percentile(usable, [2, 98])) if len(usable) else (0.0, 1.0)
    return (values - low) / max(high - low, 1e-12)


def own_colours(values: np.ndarray, valid: np.ndarray, *, larger_is_nearer: bool) -> np.ndarray:
    """(H,W,3) uint8 of a map (H,W) in its `own_range`: near is bright, grey where not valid."""
    return colourise(own_range(values if larger_is_nearer else -values, valid), valid, NEARNESS)


def shrink(picture: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Every n-th row and column, so that the longer side is at most about `side`; values are picked, never mixed."""
    step = max(1, -(-max(picture.shape[:2]) // side))
    return picture[step // 2 :: step, step // 2 :: step]


@dataclass(frozen=True, slots=True)
class Dots:
    """How a map is drawn. source: for each pixel of the picture the flat index of the map's pixel that it shows, -1 for
    none; None: every n-th pixel, as in `shrink`. grown: whether points are drawn enlarged.
    """

    source: np.ndarray | None = None
    grown: bool = False

    def picture(self, position: np.ndarray, valid: np.ndarray, ramp: Ramp) -> np.ndarray:
        """Colourise and shrink the map, with its points enlarged as `source` says."""
        if self.source is None:
            return shrink(colourise(position, valid, ramp))
        covered = self.source >= 0
        return colourise(position.reshape(-1)[np.maximum(self.source, 0)], covered, ramp)


def dots(valid: np.ndarray, *, cover: float = 0.5, most: int = 6) -> Dots:
    """How to draw a map with few valid pixels: no point is lost in shrinking, and each is enlarged.

    Points grow by a pixel at a time, up to `most`, until `cover` of the picture is covered; nearest points win.
    """
    rows, columns = valid.shape
    step = max(1, -(-max(rows, columns) // SIDE))
    height, width = -(-rows // step), -(-columns // step)
    source = np.full((height, width), -1, np.intp)
    down, across = np.nonzero(valid)
    source[down // step, across // step] = down * columns + across
    for _ in range(most):
        if not len(down) or (source >= 0).mean() >= cover:
            break
        before = source.copy()
        for shift, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1)):
            moved = np.roll(before, shift, axis)
            edge = [slice(None), slice(None)]
            edge[axis] = slice(0, 1) if shift > 0 else slice(-1, None)
            moved[tuple(edge)] = -1
            source = np.where(source < 0, moved, source)
    return Dots(source, True)


def data_uri(picture: np.ndarray, *, photo: bool = False) -> str:
    """A picture (H,W,3) uint8 as a data: address; `photo` as JPEG, else as PNG, with a palette if that is exact."""
    image, buffer = Image.fromarray(picture), io.BytesIO()
    if photo:
        image.save(buffer, "JPEG", quality=86, optimize=True)
    else:
        exact_palette = image.getcolors(256) is not None
        (image.quantize(256, dither=Image.Dither.NONE) if exact_palette else image).save(buffer, "PNG", optimize=True)
    image_format = "jpeg" if photo else "png"
    return f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def tile(caption: str, picture: np.ndarray, *, note: str = "", photo: bool = False) -> str:
    """A picture with its caption; `note` is a number or a remark beside it."""
    height, width = picture.shape[:2]
    beside = f"<span>{escape(note)}</span>" if note else ""
    label = escape(f"{caption} {note}".strip())
    return (
        f'<figure class="tile"><img src="{data_uri(picture, photo=photo)}" width="{width}" height="{height}" '
        f'alt="{label}"><figcaption><b>{escape(caption)}</b>{beside}</figcaption></figure>'
    )


def legend(title: str, ramp: Ramp, ticks: Sequence[tuple[float, str]], *, missing: str = "") -> str:
    """A colour bar with labels at positions 0..1 and, with `missing`, a swatch for pixels without a value."""
    stops = ",".join(f"rgb{colour} {100 * i / (len(ramp) - 1):.1f}%" for i, colour in enumerate(ramp))
    labels = []
    for position, text in ticks:
        side = "start" if position < 0.06 else "end" if position > 0.94 else "middle"
        labels.append(f'<span class="{side}" style="left:{100 * position:.1f}%">{escape(text)}</span>')
    swatch = f'<span class="swatch"><i style="background:rgb{INVALID}"></i>{escape(missing)}</span>' if missing else ""
    return (
        f'<div class="legend"><span class="name">{escape(title)}</span><div class="bar"><div style="background:'
        f'linear-gradient(90deg,{stops})"></div><p>{"".join(labels)}</p></div>{swatch}</div>'
    )


def depth_legend(span: tuple[float, float]) -> str:
    """The legend of `nearness`: metres, at round numbers, far on the left."""
    near, far = span
    candidates = [m * 10.0**e for e in range(-2, 4) for m in (1, 2, 5)]
    ticks, taken = [(0.0, f"{far:.3g} m"), (1.0, f"{near:.3g} m")], [0.0, 1.0]
    for depth in candidates:
        position = math.log(far / depth) / math.log(far / near)
        if near < depth < far and all(abs(position - other) > 0.16 for other in taken):
            ticks.append((position, f"{depth:.3g}"))
            taken.append(position)
    return legend("depth", NEARNESS, sorted(ticks), missing="no truth")


# --- charts -----------------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 10, 30
POINTS = 240


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A line of a chart. style: "line", "faint" (behind the others, not in the legend) or "points" (joined)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "line"
    colour: int = 1


def smooth(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """An exponential moving average without the bias of its start."""
    out, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(total / norm)
    return out


def _thin(series: Series) -> list[tuple[float, float]]:
    """The series with at most POINTS points, each the mean of its neighbours; points are kept as they are."""
    pairs = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    size = -(-len(pairs) // POINTS)
    if size <= 1 or series.style == "points":
        return pairs
    groups = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _round_numbers(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from low to high."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * k for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.4g}"


@dataclass(frozen=True, slots=True)
class _Axis:
    """A value axis, linear or logarithmic."""

    low: float
    high: float
    log: bool

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        if self.log:
            return (math.log(max(value, self.low)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round numbers along it."""
        if not self.log:
            return _round_numbers(self.low, self.high, 4)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        many = math.log10(self.high / self.low) > 2.5
        marks = [m * 10.0**d for d in decades for m in ((1,) if many else (1, 2, 5))]
        return [mark for mark in marks if self.low <= mark <= self.high]


def _axis(values: Sequence[float], log: bool, zero: bool) -> _Axis:
    low, high = min(values), max(values)
    if log and low > 0:
        return _Axis(low / 1.15, high * 1.15 if high > low else low * 2, True)
    if zero and low >= 0:
        low = 0.0
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return _Axis(low if low == 0.0 and zero else low - room, high + room, False)


def _tick_text(x: float, tick: float) -> str:
    """The number below a tick; at the axis's ends it stays inside, clear of the axis's name."""
    anchor = "end" if x > _WIDTH - _RIGHT - 12 else "start" if x < _LEFT + 12 else "middle"
    return f'<text x="{x:.1f}" y="{_HEIGHT - 10}" text-anchor="{anchor}">{_short(tick)}</text>'


def chart(
    title: str,
    series: Sequence[Series],
    *,
    note: str = "",
    log: bool = False,
    zero: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """A line chart over training steps, as a figure with its legend; marks are vertical lines with a text.

    log: a logarithmic y axis, if all values are positive. zero: the y axis starts at 0. Empty without a value.
    """
    drawn = [(line, _thin(line)) for line in series]
    ys = [y for _, points in drawn for _, y in points]
    if not ys:
        return ""
    xs = [x for line in series for x in line.x] + [at for at, _ in marks]
    across, up = _Axis(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, False), _axis(ys, log, zero)

    def px(x: float) -> float:
        return _LEFT + across.place(x) * (_WIDTH - _LEFT - _RIGHT)

    def py(y: float) -> float:
        return _HEIGHT - _BOTTOM - up.place(y) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in up.ticks():
        parts.append(f'<path class="grid" d="M{_LEFT} {py(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{py(tick) + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    for tick in _round_numbers(across.low, across.high, 4):
        parts.append(_tick_text(px(tick), tick))
    parts.append(f'<text x="{_LEFT - 6}" y="{_HEIGHT - 10}" text-anchor="end">step</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>')
    for at, text in marks:
        rule = f'<path class="mark" d="M{px(at):.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>'
        parts.append(f"<g><title>{escape(text)}</title>{rule}</g>")
    for line, points in sorted(drawn, key=lambda pair: pair[0].style != "faint"):
        path = "".join(f"{'L' if i else 'M'}{px(x):.1f} {py(y):.1f}" for i, (x, y) in enumerate(points))
        parts.append(f'<path class="line s{line.colour} {line.style}" d="{path}"/>')
        if line.style == "points" or len(points) == 1:
            parts += [
                f'<circle class="s{line.colour}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3"><title>'
                f"{escape(line.name)}, step {_short(x)}: {_short(y)}</title></circle>"
                for x, y in points
            ]
    named = [line for line in series if line.style != "faint"]
    keys = "".join(f'<li><i class="s{line.colour}"></i>{escape(line.name)}</li>' for line in named)
    label = f"{title}: " + "; ".join(f"{s.name} ends at {_short(p[-1][1])}" for s, p in drawn if s in named and p)
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b>{f"<ul>{keys}</ul>" if len(named) > 1 else ""}'
        f'</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>{f'<p>{escape(note)}</p>' if note else ''}</figure>"
    )


def scatter(title: str, points: Sequence[tuple[float, float, str]], *, across: str, note: str = "") -> str:
    """Named points (x, y, name) over a logarithmic x axis in the unit `across`, as a figure."""
    along, up = _axis([x for x, _, _ in points], True, False), _axis([y for _, y, _ in points], False, False)
    parts = []

    def px(x: float) -> float:
        return _LEFT + along.place(x) * (_WIDTH - _LEFT - _RIGHT)

    def py(y: float) -> float:
        return _HEIGHT - _BOTTOM - up.place(y) * (_HEIGHT - _TOP - _BOTTOM)

    for tick in up.ticks():
        parts.append(f'<path class="grid" d="M{_LEFT} {py(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{py(tick) + 4:.1f}" text-anchor="end">{_short(tick)}</text>')
    marks = along.ticks()
    marks = marks if len(marks) > 1 else _round_numbers(along.low, along.high, 3)
    for tick in marks:
        parts.append(_tick_text(px(tick), tick))
    parts.append(f'<text x="{_LEFT - 6}" y="{_HEIGHT - 10}" text-anchor="end">{escape(across)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>')
    for i, (x, y, name) in enumerate(points):
        colour, left = f"s{i % 6 + 1}", px(x) > 0.6 * _WIDTH
        side = f'x="{px(x) + (-9 if left else 9):.1f}" text-anchor="{"end" if left else "start"}"'
        parts.append(f'<circle class="{colour}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="5"><title>')
        parts.append(f"{escape(name)}: {_short(x)} {escape(across)}, {_short(y)}</title></circle>")
        parts.append(f'<text {side} y="{py(y) + 4:.1f}">{escape(name)}</text>')
    label = f"{title}: " + "; ".join(f"{name} {_short(y)} at {_short(x)} {across}" for x, y, name in points)
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b></figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>{f"<p>{escape(note)}</p>" if note else ""}'
        "</figure>"
    )


# --- histograms -------------------------------------------------------------------------------------------------------


def bars(title: str, heights: Sequence[float], ends: tuple[str, str], *, note: str = "", colour: int = 1) -> str:
    """A histogram as a figure; heights are fractions."""
    width, tall, highest = 400 / len(heights), 150.0, max(max(heights), 1e-9)
    bars = "".join(
        f'<rect x="{i * width + 1:.1f}" y="{tall - tall * h / highest:.1f}" width="{width - 2:.1f}" '
        f'height="{tall * h / highest:.1f}" fill="var(--s{colour})"><title>{100 * h:.1f} %</title></rect>'
        for i, h in enumerate(heights)
    )
    texts = (
        f'<text x="0" y="168">{escape(ends[0])}</text><text x="400" y="168" text-anchor="end">{escape(ends[1])}</text>'
    )
    note_text = f"<p>{escape(note)}</p>" if note else ""
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b></figcaption>{note_text}'
        f'<svg viewBox="0 0 400 176" role="img" aria-label="{escape(title)}">{bars}'
        f'<path class="axis" d="M0 150H400"/>{texts}</svg></figure>'
    )


def histogram(values: Sequence[float], low: float, high: float) -> list[float]:
    """The share of the values in each of BINS equal parts from low to high."""
    counts = np.histogram(values, BINS, (low, high if high > low else low + 1.0))[0]
    return [float(c) for c in counts / max(1, len(values))]

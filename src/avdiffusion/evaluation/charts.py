"""Small charts as SVG inside a page, coloured by the page's style (`STYLE`).

Lines are stretched to whatever width there is and keep their thickness; texts stand beside them as
HTML and keep their size.
"""

from collections.abc import Sequence
from html import escape

import numpy as np

from avdiffusion.evaluation.text import number

WIDTH, HEIGHT = 168, 20  # of the chart of an interval
STYLE = """
svg{display:block;overflow:visible}
.span{width:168px;max-width:100%;height:auto}
.span path{fill:none}
.span .axis,.plot .axis{stroke:var(--line)}
.span .range{stroke:var(--accent);opacity:.35}.span .value{fill:var(--accent)}
.span .real{stroke:var(--real)}.span .chance{stroke:var(--soft)}
.weak .span .range{stroke:var(--soft)}.weak .span .value{fill:var(--soft)}
.plot{position:relative}
.plot svg{width:100%;height:100%}
.plot path,.plot line{fill:none;vector-effect:non-scaling-stroke;stroke-width:1.5;
stroke-linejoin:round}
.plot .axis{stroke-width:1}
.plot .motion{stroke:var(--motion)}.plot .onset{stroke:var(--onset)}
.plot .motion.fill{fill:var(--motion);stroke:none;opacity:.22}
.plot .onset.fill{fill:var(--onset);stroke:none;opacity:.22}
.plot .mark{stroke:var(--ink);stroke-width:1;stroke-dasharray:3 3}
.plot .lag{stroke:var(--accent);stroke-width:2}
.plot .band{fill:var(--soft);stroke:none;opacity:.25}
.plot span{position:absolute;font-size:11px;line-height:1;color:var(--soft);
font-variant-numeric:tabular-nums;white-space:nowrap}
.lagplot{margin:8px 32px 26px 48px;height:150px}
.lagplot .x{top:calc(100% + 6px);transform:translateX(-50%)}
.lagplot .y{right:calc(100% + 6px);transform:translateY(-50%)}
.curves{height:76px}
"""


def interval_chart(
    value: float | None,
    *,
    low: float | None = None,
    high: float | None = None,
    real: float | None = None,
    chance: float | None = None,
) -> str:
    """A value in its interval, with marks at what real clips get and at chance, on an axis with 0.

    Nothing where there is no more than a value.
    """
    marks = {"real": real, "chance": chance}
    marks = {name: at for name, at in marks.items() if at is not None}
    ends = [] if low is None or high is None else [low, high]
    if value is None or not (ends or marks):
        return ""
    points = [0, value, *marks.values(), *ends]
    start, end = min(points), max(points)
    length = (end - start) or 1
    middle = HEIGHT / 2

    def at(x):
        return f"{6 + (x - start) / length * (WIDTH - 12):.1f}"

    parts = [f'<path class=axis d="M6 {middle}H{WIDTH - 6}M{at(0)} 6V14"/>']
    told = [f"value {number(value)}"]
    if ends:
        parts.append(f'<path class=range stroke-width=8 d="M{at(low)} {middle}H{at(high)}"/>')
        told.append(f"95 % interval {number(low)} to {number(high)}")
    for name, x in marks.items():
        dash = ' stroke-dasharray="2 2"' if name == "chance" else ""
        parts.append(f'<path class={name} stroke-width=2{dash} d="M{at(x)} 2V18"/>')
        told.append(f"{'real clips' if name == 'real' else name} {number(x)}")
    parts.append(f'<circle class=value r=4 cx="{at(value)}" cy="{middle}"/>')
    label = escape(", ".join(told))
    return (
        f'<svg class=span viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{label}">'
        f"<title>{label}</title>{''.join(parts)}</svg>"
    )


def curves(
    time: Sequence[float],
    motion: Sequence[float],
    onset: Sequence[float],
    *,
    lag: float | None = None,
    seconds: float | None = None,
) -> str:
    """Motion upwards and sound onsets downwards over a clip's time, as wide as its strip.

    Of the strongest motion whose sound the clip still holds, dashed lines mark when it is seen and,
    `lag` seconds on, heard.
    """
    seconds = seconds or time[0] + time[-1]
    x = np.asarray(time, float) / seconds * 100
    parts = ['<path class=axis d="M0 50H100"/>']
    for name, values, side in (("motion", motion, -1), ("onset", onset, 1)):
        level = np.nan_to_num(np.asarray(values, float))
        level -= level.min()
        y = 50 + side * 46 * level / (level.max() or 1)
        line = _line(x, y)
        parts.append(f'<path class="{name} fill" d="{line}L{x[-1]:.2f} 50L{x[0]:.2f} 50Z"/>')
        parts.append(f'<path class={name} d="{line}"/>')
    heard = x + 100 * (lag or 0) / seconds
    inside = np.flatnonzero((heard >= 0) & (heard <= 100))
    if lag is not None and len(inside):
        k = max(inside, key=lambda each: motion[each] or 0)
        parts.append(f'<path class=mark d="M{x[k]:.2f} 0V50M{heard[k]:.2f} 50V100"/>')
        parts.append(f'<path class=lag d="M{x[k]:.2f} 50H{heard[k]:.2f}"/>')
    label = f"motion and sound onsets over {number(seconds)} s" + (
        "" if lag is None else f", the sound {late(lag)}"
    )
    return _plot("curves", parts, label)


def lag_curve(
    lags: Sequence[float],
    curve: Sequence[float],
    *,
    low: Sequence[float] | None = None,
    high: Sequence[float] | None = None,
) -> str:
    """Correlation over the lag of the sound, in seconds, its greatest value marked.

    Behind it the band from `low` to `high` in which the curves of mismatched pairs lie.
    """
    lags, curve = np.asarray(lags, float), np.nan_to_num(np.asarray(curve, float))
    sides = [np.nan_to_num(np.asarray(s, float)) for s in (low, high) if s is not None]
    bottom = min(0.0, *(one.min() for one in [curve, *sides]))
    top = max(1e-3, *(one.max() for one in [curve, *sides]))

    def across(lag):
        return 100 * (lag - lags[0]) / ((lags[-1] - lags[0]) or 1)

    def up(value):
        return 100 - 100 * (value - bottom) / (top - bottom)

    parts = [f'<path class=axis d="M0 {up(0):.2f}H100M{across(0):.2f} 0V100"/>']
    if len(sides) == 2:
        x, y = across(np.append(lags, lags[::-1])), up(np.append(sides[0], sides[1][::-1]))
        parts.append(f'<path class=band d="{_line(x, y)}Z"/>')
    best = lags[curve.argmax()]
    parts.append(f'<path class=mark d="M{across(best):.2f} 0V100"/>')
    parts.append(f'<path class=lag d="{_line(across(lags), up(curve))}"/>')
    texts = [
        f'<span class=x style="left:{across(lag):.2f}%">{1000 * lag:+.0f} ms</span>'
        for lag in np.linspace(lags[0], lags[-1], 5)
    ]
    texts += [
        f'<span class=y style="top:{up(value):.2f}%">{number(value, 2)}</span>'
        for value in (bottom, 0, top)
        if value in (0, top) or up(0) < 88  # where it does not lie on the 0
    ]
    label = f"correlation over lag, greatest where the sound is {late(best)}"
    return _plot("lagplot", parts, label, "".join(texts).replace("+0 ms", "0 ms"))


def late(lag: float) -> str:
    """How the sound lies to the picture, in words."""
    if abs(lag) < 0.0005:
        return "on time"
    return f"{abs(1000 * lag):.0f} ms {'late' if lag > 0 else 'early'}"


def _line(x, y):
    return "M" + "L".join(f"{a:.2f} {b:.2f}" for a, b in zip(x, y, strict=True))


def _plot(kind, parts, label, texts=""):
    label = escape(label)
    return (
        f'<div class="plot {kind}"><svg viewBox="0 0 100 100" preserveAspectRatio=none role=img '
        f'aria-label="{label}">{"".join(parts)}</svg>{texts}</div>'
    )

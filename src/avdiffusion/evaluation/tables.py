"""A group of figures as a table of a page, with the curves that belong to it."""

from collections.abc import Mapping
from html import escape

from avdiffusion.evaluation import charts
from avdiffusion.evaluation.text import (
    BETTER,
    conditions,
    counts,
    floor,
    interval,
    number,
    short,
    weak,
    with_unit,
)
from avdiffusion.gallery import table_html

COLUMNS = {  # field of a figure: head of its column, what it means
    "value": ("Value", "with its 95 % interval; the notes say by what"),
    "floor": ("Real against real", "what so many real clips get against the reference"),
    "chance": ("Chance", "what mismatched pairs get"),
    "ceiling": ("Real", "what real clips get"),
    "power": ("Power", "how well real pairs are told from shifted ones (AUROC) on the reference"),
    "n": ("Clips", "samples, and the clips that they were compared to"),
}
ELSEWHERE = ("pairs", "clips", "curves")  # details that are told clip by clip
LEGEND = """<ul class=legend><li class=value>value<li class=range>95 % interval
<li class=real>real clips<li class=chance>chance</ul>"""


def group_html(group: Mapping, report: Mapping) -> str:
    """One row for each figure, its extractor, notes and details below, to be opened."""
    figures = group["figures"]
    if not figures:
        return ""
    given = {name for figure in figures for name in COLUMNS if figure.get(name) is not None}
    columns = [name for name in COLUMNS if name in {"value", "n"} | given]
    head = "".join(
        f'<th scope=col class={name} title="{meaning}">{title}'
        for name, (title, meaning) in COLUMNS.items()
        if name in columns
    )
    compared = any(figure.get("n_reference") for figure in figures)
    caption = f"<caption>{escape(conditions(report))}</caption>" if compared else ""
    head = f"<thead><tr><th scope=col>Figure{head}</thead>"
    body = "".join(_row(figure, columns) for figure in figures)
    table = f"<table class=figures>{caption}{head}{body}</table>"
    drawn = LEGEND if "class=span" in body else ""
    found = [figure.get("details") or {} for figure in figures]
    lags = dict.fromkeys(_lag_curve(each) for each in found if {"lags", "curve"} <= each.keys())
    return table + drawn + "".join(lags)  # the same curve once


def tile_html(figure: Mapping) -> str:
    """One figure, large."""
    texts = {"real against real": floor(figure)}
    for name, field in (("chance", "chance"), ("real", "ceiling")):
        texts[name] = "" if figure.get(field) is None else number(figure[field])
    beside = ", ".join(f"{name} {text}" for name, text in texts.items() if text)
    return (
        f'<div class="tile{_weak(figure)}"><h3>{_label(figure)}</h3>'
        f"<b>{escape(with_unit(figure))}</b> <small>{interval(figure)}</small>{_span(figure)}"
        f"<p>{escape(weak(figure) or beside)}</div>"
    )


def _row(figure, columns):
    cells = {
        "value": f"<b>{escape(with_unit(figure))}</b> <small>{interval(figure)}</small>"
        + _span(figure),
        "floor": _small(floor(figure)),
        "chance": number(figure.get("chance")),
        "ceiling": number(figure.get("ceiling")),
        "power": number(figure.get("power"), 2),
        "n": counts(figure),
    }
    row = "".join(
        f'<td class={name} data-head="{COLUMNS[name][0]}">{cells[name] or "–"}' for name in columns
    )
    note = f"<small>{escape(weak(figure))}</small>" if weak(figure) else ""
    return (
        f'<tbody class="one{_weak(figure)}"><tr><th scope=row>{_label(figure)}{note}{row}'
        f"<tr class=how><td colspan={len(columns) + 1}>{_how(figure)}</tbody>"
    )


def _how(figure):
    """The extractor in a line; opened, notes and details."""
    notes = "".join(f"<li>{escape(str(note))}" for note in figure.get("notes") or ())
    details = figure.get("details") or {}
    details = {name: short(details[name]) for name in details if name not in ELSEWHERE}
    inside = (f"<ul>{notes}</ul>" if notes else "") + table_html(details)
    name = escape(figure.get("extractor") or figure["key"])
    if not inside:
        return f"<p>{name}</p>"
    count = f" · {len(figure['notes'])} notes" if len(figure.get("notes") or ()) > 1 else ""
    return f"<details><summary>{name}{count}</summary>{inside}</details>"


def _lag_curve(details):
    chart = charts.lag_curve(
        details["lags"],
        details["curve"],
        low=details.get("curve_low"),
        high=details.get("curve_high"),
    )
    told = "correlation of motion and sound over the lag of the sound: right of 0 it is late"
    if "curve_low" in details:
        told += "; grey: 95 % of mismatched pairs"
    return f"<figure class=wide>{chart}<figcaption>{told}</figcaption></figure>"


def _span(figure):
    real = figure.get("floor") if figure.get("floor") is not None else figure.get("ceiling")
    ends = {"low": figure.get("low"), "high": figure.get("high")}
    return charts.interval_chart(
        figure.get("value"), **ends, real=real, chance=figure.get("chance")
    )


def _label(figure):
    label = escape(figure.get("label") or figure["key"])
    if better := figure.get("better"):
        label += f' <abbr title="{better} is better">{BETTER[better]}</abbr>'
    return label


def _weak(figure):
    return " weak" if weak(figure) else ""


def _small(text):
    """What stands in brackets below the rest, smaller."""
    first, _, rest = escape(text).partition(" (")
    return f"{first} <small>{rest.rstrip(')')}</small>" if rest else first

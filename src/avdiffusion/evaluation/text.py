"""A report as Markdown tables, and the words and numbers that every form of it shares.

A report is the plain dict that report.json holds; `evaluation.page` says what it may contain.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from avdiffusion.metrics.power import NEEDED

SETS = {
    "samples": "Samples",
    "reference": "Reference",
    "train": "Training clips",
    "real": "Real clips beside them",
}
CODEC = "codec read"  # the line of a set that stands beside every distance
BETTER = {"lower": "↓", "higher": "↑"}
LONG = 32  # numbers of a list that are shown
ROWS = 20  # pairs listed in Markdown at most


def number(value: float | None, digits: int = 3) -> str:
    """The value with so many significant digits, whole from there on; – where there is none."""
    if value is None or value != value:
        return "–"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".rstrip(".").replace("e-0", "e-")


def with_unit(figure: Mapping, digits: int = 3) -> str:
    """A figure's value and its unit."""
    return f"{number(figure.get('value'), digits)} {figure.get('unit') or ''}".strip()


def interval(figure: Mapping, digits: int = 3) -> str:
    """A figure's 95 % interval; nothing if it has none."""
    if figure.get("low") is None or figure.get("high") is None:
        return ""
    return f"{number(figure['low'], digits)} to {number(figure['high'], digits)}"


def floor(figure: Mapping, digits: int = 3) -> str:
    """What real clips get against real ones, and how many they were."""
    if figure.get("floor") is None:
        return ""
    count = figure.get("floor_n")
    return number(figure["floor"], digits) + (f" (N {count})" if count else "")


def counts(figure: Mapping) -> str:
    """How many samples, and how many clips they were compared to."""
    against = figure.get("n_reference")
    return f"{figure.get('n') or '–'}" + (f" / {against}" if against else "")


def weak(figure: Mapping) -> str:
    """Why a figure says nothing; nothing if it does say something."""
    power = figure.get("power")
    if figure.get("blind"):
        return "says nothing on this data: it finds nothing in real clips"
    if power is None or power >= NEEDED:
        return ""
    return f"says nothing on this data: its power is {number(power, 2)}, below {NEEDED}"


def conditions(report: Mapping) -> str:
    """What was compared to what and how it was read, in a line: it stands beside every distance."""
    sets, lines = report.get("sets") or {}, (report.get("protocol") or {}).get("lines") or ()
    compared = [sets[place] for place in ("samples", "reference") if place in sets]
    texts = [" against ".join(map(named, compared))] if compared else []
    texts += [f"{what} {value}" for what, value in lines]
    codecs = [dict(one.get("lines") or ()).get(CODEC) for one in compared]
    if codecs := dict.fromkeys(filter(None, codecs)):  # once if it is the same
        texts.append(f"{CODEC}: {' against '.join(codecs)}")
    return "; ".join(texts)


def named(one: Mapping) -> str:
    """A set of clips by its size, name and hash."""
    name = one.get("name") or "/".join(PurePath(one.get("path") or "–").parts[-2:])
    begin = f" ({one['hash'][:12]})" if one.get("hash") else ""
    return f"{one.get('count', '–')} clips of {name}{begin}"


def origin(report: Mapping) -> str:
    """When, by what and by which protocol a report was made."""
    protocol, seconds = (report.get("protocol") or {}).get("name"), report.get("seconds")
    texts = [
        f"protocol {protocol}" if protocol else "",
        report.get("created") or "",
        f"avdiffusion {report['version']}" if report.get("version") else "",
        f"measured in {seconds:.0f} s" if seconds else "",
    ]
    return " · ".join(text for text in texts if text)


def short(value: object) -> str:
    """A detail as text, of long lists the beginning."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {short(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        more = f", … ({len(value)} in all)" if len(value) > LONG else ""
        return ", ".join(map(short, value[:LONG])) + more
    return number(value, 4) if value is None or isinstance(value, float) else str(value)


def report_markdown(report: Mapping) -> str:
    """The tables of a report for a paper or an issue; each distance with all it depends on."""
    parts = [f"# {_plain(report.get('title') or 'Evaluation')}", _plain(origin(report))]
    if warnings := report.get("warnings"):
        parts.append("\n>\n".join(f"> **Warning:** {_plain(text)}" for text in warnings))
    parts.append("## What was measured\n\n" + _measured(report))
    parts += [_group(group, report) for group in report.get("groups") or () if group["figures"]]
    if pairs := report.get("pairs"):
        parts.append(_pairs(pairs))
    if command := report.get("command"):
        parts.append(f"## Command\n\n    {' '.join(command.split())}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _measured(report):
    sets, protocol = report.get("sets") or {}, report.get("protocol") or {}
    rows = [[SETS.get(place, place), named(one), _lines(one)] for place, one in sets.items()]
    rows.append(["Protocol", protocol.get("name") or "", _lines(protocol)])
    return _table(["", "", "read as"], rows)


def _lines(one):
    return "; ".join(f"{what} {value}" for what, value in one.get("lines") or ())


def figure_rows(group: Mapping, report: Mapping) -> tuple[list[str], list[list[str]]]:
    """A group's table as texts: the heads of its columns, of which none is empty, and its rows."""
    columns = {
        "Figure": lambda f: f"{f.get('label') or f['key']} {BETTER.get(f.get('better'), '')}",
        "Value": lambda f: with_unit(f, 4),
        "95 % interval": lambda f: interval(f, 4),
        "Real against real": lambda f: floor(f, 4),
        "Chance": lambda f: _given(f, "chance"),
        "Real": lambda f: _given(f, "ceiling"),
        "Power": _power,
        "N": counts,
        "Extractor": lambda f: f.get("extractor") or "",
        "Read as": lambda f: conditions(report) if f.get("n_reference") else "",
    }
    rows = [[cell(figure).strip() for cell in columns.values()] for figure in group["figures"]]
    kept = [k for k in range(len(columns)) if any(row[k] for row in rows)]
    return [list(columns)[k] for k in kept], [[row[k] for k in kept] for row in rows]


def _group(group, report):
    notes = [
        f"- {_plain(figure.get('label') or figure['key'])}: {_plain(note)}"
        for figure in group["figures"]
        for note in figure.get("notes") or ()
    ]
    table = _table(*figure_rows(group, report))
    parts = [f"## {_plain(group['title'])}", table, "\n".join(notes)]
    return "\n\n".join(part for part in parts if part)


def _given(figure, field):
    return "" if figure.get(field) is None else number(figure[field], 4)


def _power(figure):
    if figure.get("power") is None:
        return ""
    return number(figure["power"], 2) + (f" (says nothing below {NEEDED})" if weak(figure) else "")


def _pairs(pairs):
    rows = []
    for pair in pairs[:ROWS]:
        near = [number(pair.get("distance")), number(pair.get("ratio"))]
        rows.append([pair["sample"], pair["neighbour"], pair.get("of") or "", *near])
    table = _table(["Sample", "Nearest training clip", "By", "Distance", "Ratio"], rows)
    left = len(pairs) - len(rows)
    more = f"\n\n{left} more in report.json." if left else ""
    return f"## Nearest training clips\n\n{table}{more}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _plain(text):
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(str(text).split()))

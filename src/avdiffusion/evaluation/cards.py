"""Samples of a page: player, strip, curves and scores, over the nearest training clip."""

from collections.abc import Mapping
from html import escape

from avdiffusion.evaluation.charts import curves, late
from avdiffusion.evaluation.text import number
from avdiffusion.gallery import Entry, clip_html, fitting, strip_html

KEYS = """<ul class=legend><li class=motion>motion of the picture, upwards
<li class=onset>onsets of the sound, downwards
<li class=lag>from the strongest motion to where its sound is heard</ul>"""
NEAREST = """<p>Below each sample the training clip that is nearest to it, the most suspicious pair
first. Ratio: the distance to it over the distance to the nearest clip that was held out; far below
1 the sample may be a copy.</p>"""


def cards_html(report: Mapping, entries: Mapping[str, Entry], limit: int) -> str:
    """The samples with an entry, those with a known nearest training clip first.

    At most `limit` bytes of them; the others of the report are counted.
    """
    clips = {clip["name"]: clip for clip in report.get("clips") or ()}
    pairs = {}
    for pair in report.get("pairs") or ():
        pairs.setdefault(pair["sample"], []).append(pair)
    named = {**pairs, **entries}
    names = [name for name in named if name in entries and not name.startswith("/train/")]
    cards = (_card(name, clips.get(name, {}), pairs.get(name, ()), entries) for name in names)
    shown = fitting(cards, limit)
    if not shown:
        return ""
    left = len({*clips, *names}) - len(shown)
    more = (
        f"<p class=more>{left} more samples, left out to keep the page small.</p>" if left else ""
    )
    drawn = any("curves" in clips.get(name, {}) for name in names)
    return NEAREST * bool(pairs) + KEYS * drawn + "\n".join(shown) + more


def _card(name, clip, pairs, entries):
    scores = clip.get("scores") or {}
    facts = [f"{escape(key)} <b>{number(value)}</b>" for key, value in scores.items()]
    chart = ""
    if found := clip.get("curves"):
        lag = found.get("lag")
        lines = (found["time"], found["motion"], found["onset"])
        chart = curves(*lines, lag=lag, seconds=found.get("seconds"))
        facts += [] if lag is None else [f"sound <b>{late(lag)}</b>"]
    html = _band(f"<b>{escape(name)}</b>", facts, entries[name], chart)
    shown = set()
    for pair in pairs:
        other = f"/train/{pair['neighbour']}"
        entry = None if other in shown else entries.get(other)
        shown.add(other)
        html += _band(_near(pair), _distances(pair), entry)
    return f"<figure class=card>{html}</figure>"


def _near(pair):
    by = f" by {escape(pair['of'])}" if pair.get("of") else ""
    return f"nearest{by}: <b>{escape(pair['neighbour'])}</b>"


def _distances(pair):
    found = {what: pair[what] for what in ("distance", "ratio") if pair.get(what) is not None}
    return [f"{what} <b>{number(value)}</b>" for what, value in found.items()]


def _band(title, facts, entry, chart=""):
    """A player beside what is seen and heard in it over one time axis."""
    clip, strip = (clip_html(entry), strip_html(entry)) if entry else ("", "")
    facts = "".join(f"<span>{fact}</span>" for fact in facts)
    shown = f"{clip}<div class=time>{strip}{chart}</div>" if clip or strip or chart else ""
    return f"<div class=band><p><span>{title}</span>{facts}</p>{shown}</div>"

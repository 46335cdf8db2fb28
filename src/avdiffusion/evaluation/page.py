"""A report as one HTML page that needs nothing beside it: tables, charts, players.

A report is a plain dict, of which any part may be missing:
title, created, version, command, seconds;
protocol: {name, lines: [[what, value]]};
sets: {samples, reference, train, real: {name, path, count, hash, lines}};
main: keys of the figures shown large on top, else the first of each group;
groups: [{title, figures: the fields of `metrics.metric.Figure`}], where `lags` and `curve` among a
figure's details are drawn, over the band from `curve_low` to `curve_high`;
warnings: [text];
pairs: [{sample, neighbour, of, distance, ratio}], the most suspicious first;
clips: [{name, scores: {key: value}, curves: {time, motion, onset, lag, seconds}}].
"""

import json
from collections.abc import Mapping
from html import escape

from avdiffusion.evaluation import charts
from avdiffusion.evaluation.cards import cards_html
from avdiffusion.evaluation.tables import group_html, tile_html
from avdiffusion.evaluation.text import SETS, conditions, named, origin
from avdiffusion.gallery import LIMIT, Entry, page_html, table_html

LONG = 400  # characters of a field that a page shows


def report_html(report: Mapping, entries: Mapping[str, Entry], *, limit: int = LIMIT) -> str:
    """The page; `entries` are the players of samples by name, of training clips by /train/<name>.

    Once the clips would exceed `limit` bytes the remaining ones are counted instead of shown.
    """
    title = report.get("title") or "Evaluation"
    groups = [(group["title"], group_html(group, report)) for group in report.get("groups") or ()]
    sections = [
        *groups,
        ("Samples", cards_html(report, entries, limit)),
        ("What was measured", _measured(report)),
        ("All numbers", _numbers(report)),
    ]
    sections = [(k, name, html) for k, (name, html) in enumerate(sections) if html]
    links = "".join(f'<a href="#s{k}">{escape(name)}</a>' for k, name, _ in sections)
    body = _head(title, report) + f"<nav aria-label=Sections>{links}</nav>"
    for k, name, html in sections:
        body += f"\n<section id=s{k}><h2>{escape(name)}</h2>{html}</section>"
    return page_html(title, f"<article>{body}</article>", charts.STYLE + STYLE)


def _head(title, report):
    html = f"<header><h1>{escape(title)}</h1><p class=lead>{escape(conditions(report))}</p>"
    html += f"<p>{escape(origin(report))}</p></header>"
    if warnings := report.get("warnings"):
        items = "".join(f"<li>{escape(text)}" for text in warnings)
        html += f"<ul class=warnings aria-label=Warnings>{items}</ul>"
    groups = [group["figures"] for group in report.get("groups") or () if group["figures"]]
    figures = {figure["key"]: figure for group in groups for figure in group}
    main = report.get("main") or [group[0]["key"] for group in groups]
    tiles = [tile_html(figures[key]) for key in main if key in figures]
    return html + (f"<div class=tiles>{''.join(tiles)}</div>" if tiles else "")


def _measured(report):
    cards = ""
    for place, one in (report.get("sets") or {}).items():
        facts = {"clips": one.get("count"), "folder": one.get("path"), "hash": one.get("hash")}
        facts = {what: value for what, value in facts.items() if value is not None}
        cards += f"<div><h3>{escape(SETS.get(place, place))}</h3><p>{escape(named(one))}</p>"
        cards += table_html({**facts, **dict(one.get("lines") or ())}) + "</div>"
    if protocol := report.get("protocol"):
        cards += f"<div><h3>Protocol</h3><p>{escape(protocol.get('name', ''))}</p>"
        cards += table_html(dict(protocol.get("lines") or ())) + "</div>"
    command = report.get("command")
    return f"<div class=sets>{cards}</div>" * bool(cards) + (
        f"<pre tabindex=0>{escape(command)}</pre>" if command else ""
    )


def _numbers(report):
    """Every field of every figure, long ones cut."""
    lines = []
    for group in report.get("groups") or ():
        for figure in group["figures"]:
            fields = {name: json.dumps(value, ensure_ascii=False) for name, value in figure.items()}
            lines += ["", *(f"{name}: {_cut(text)}" for name, text in fields.items())]
    text = escape("\n".join(lines[1:]))
    if not text:
        return ""
    return f"<details><summary>Every field</summary><pre tabindex=0>{text}</pre></details>"


def _cut(text):
    return text if len(text) <= LONG else f"{text[:LONG]} … (all of it in report.json)"


STYLE = """
:root{--real:#18794e;--motion:#7a4fd0;--onset:#b95708;--warn:#7a4a00;--warnground:#fff3d6}
@media(prefers-color-scheme:dark){:root{--real:#5cc98f;--motion:#b79bf2;--onset:#f0a35e;
--warn:#f4cd85;--warnground:#2b2312}}
article{max-width:1080px;margin:0 auto}
h1{font-size:28px;letter-spacing:-.02em;line-height:1.2}
h2{font-size:19px;font-weight:650;letter-spacing:-.01em;margin:0 0 14px}
h3{font-size:13px;font-weight:600;margin:0}
header .lead{font-size:16px;color:var(--ink);margin:10px 0 2px;max-width:80ch}
header p{margin:0 0 20px;font-size:13.5px}
section{margin-top:44px;scroll-margin-top:52px}
section>p{color:var(--soft);max-width:90ch;margin:0 0 12px;font-size:13.5px}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
nav{position:sticky;top:0;z-index:2;display:flex;gap:22px;overflow-x:auto;padding:12px 0;
margin-top:24px;background:var(--ground);border-bottom:1px solid var(--line);white-space:nowrap;
font-size:13.5px}
ul{margin:0;padding:0 0 0 18px}
abbr{text-decoration:none;color:var(--soft)}
small{font-size:12px;color:var(--soft)}
pre,summary,.how p{font-family:ui-monospace,"SF Mono",Menlo,Consolas,monospace;font-size:12px}
pre{margin:14px 0 0;padding:12px 14px;overflow-x:auto;background:var(--card);
border:1px solid var(--line);border-radius:8px;white-space:pre-wrap;overflow-wrap:anywhere}
summary{cursor:pointer;color:var(--soft);overflow-wrap:anywhere}summary:hover{color:var(--ink)}
.warnings{list-style:none;padding:12px 16px;border-radius:8px;background:var(--warnground);
color:var(--warn);font-size:14px}
.warnings li+li{margin-top:6px}
.tiles{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(220px,1fr));
margin-top:20px}
.tile{padding:14px 16px;background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile h3{color:var(--soft);font-weight:500}
.tile b{font-size:26px;font-weight:600;letter-spacing:-.02em;margin-right:8px;
font-variant-numeric:tabular-nums}
.tile small{white-space:nowrap}
.tile .span{width:100%;max-width:220px;margin:6px 0}
.tile p{margin:0;font-size:12px;color:var(--soft)}
.figures{width:100%;table-layout:fixed}
.figures thead th:first-child{width:28%}.figures thead th.value{width:27%}
.figures caption{caption-side:top;padding:0 0 10px;font-size:12.5px}
.figures thead th{font-size:12px;vertical-align:bottom;border-bottom:1px solid var(--line);
cursor:help}
.figures>tbody>tr{border:0}
.figures>tbody+tbody{border-top:1px solid var(--line)}
.figures>tbody>tr>*{padding-top:10px;vertical-align:top}
.figures>tbody>tr>th{color:var(--ink);font-weight:550;font-size:14px}
.figures>tbody>tr>th small{display:block;font-weight:400;margin-top:2px}
.figures .value b{font-size:16px;font-weight:600}
.tile.weak b,.figures .weak .value b,.figures>.weak>tr>th{color:var(--soft);font-weight:400}
.figures td small{white-space:nowrap}
.figures>*>tr>:last-child{padding-right:0}
.figures>tbody>.how>td{padding:0 0 10px}
.how p{margin:0;color:var(--soft)}
.how ul{margin:8px 0;font-size:13px}
.how table{margin:6px 0;font-size:12.5px}.how table th{white-space:nowrap;vertical-align:top}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:6px 20px;padding:0;margin:12px 0 14px;
font-size:12px;color:var(--soft)}
.legend li::before{content:"";display:inline-block;margin-right:7px;vertical-align:middle}
.legend .value::before{width:8px;height:8px;border-radius:50%;background:var(--accent)}
.legend .range::before{width:18px;height:8px;background:var(--accent);opacity:.35}
.legend .real::before{width:2px;height:14px;background:var(--real)}
.legend .chance::before{height:14px;border-left:2px dashed var(--soft)}
.legend .motion::before{width:14px;height:8px;background:var(--motion)}
.legend .onset::before{width:14px;height:8px;background:var(--onset)}
.legend .lag::before{width:18px;height:2px;background:var(--accent)}
.wide{max-width:620px;margin-top:18px;padding-top:14px}
.card{margin-top:16px}
.band{display:grid;grid-template-columns:168px minmax(0,1fr);gap:0 14px;padding:12px 14px}
.band+.band{border-top:1px dashed var(--line)}
.band p{grid-column:1/-1;display:flex;flex-wrap:wrap;gap:2px 18px;margin:0 0 8px;font-size:13px;
overflow-wrap:anywhere}
.band p span+span{color:var(--soft);font-variant-numeric:tabular-nums}
.band p span+span b{color:var(--ink);font-weight:550}
.band .clip{align-self:start;border-radius:6px;overflow:hidden}
.band video{display:block;max-height:240px;object-fit:contain}
.time{grid-column:2}
.strip{border-radius:6px;overflow:hidden}
.sets{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(300px,1fr))}
.sets>div{padding:14px 16px;background:var(--card);border:1px solid var(--line);border-radius:10px}
.sets p{margin:2px 0 8px;font-size:13.5px;overflow-wrap:anywhere}
.sets th{vertical-align:top;white-space:nowrap;padding-right:14px}.sets td{padding-right:0}
@media(max-width:720px){
body{padding:20px 16px 48px}
h1{font-size:23px}
.figures,.figures>caption,.figures>tbody,.figures .how,.figures .how>td{display:block}
.figures thead{position:absolute;clip-path:inset(50%);width:1px;height:1px;overflow:hidden}
.figures>tbody>tr:first-child{display:grid;grid-template-columns:repeat(4,1fr);gap:0 12px}
.figures td.floor{grid-column:span 2}
.figures>tbody>tr>th,.figures td.value{grid-column:1/-1;padding-right:0}
.figures>tbody>tr:first-child>td{padding:4px 0}
.figures td:not(.value)[data-head]::before{content:attr(data-head);display:block;font-size:11px;
color:var(--soft)}
.figures td.value .span{width:220px}
.band{grid-template-columns:minmax(0,1fr)}
.band .clip{width:min(100%,240px);margin-bottom:8px}.time{grid-column:1}
}
"""

"""Generated clips as one HTML page that needs nothing beside it; what such pages are made of."""

import math
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

LIMIT = 48 * 2**20  # bytes of clips and pictures in one page; browsers handle more, slowly
LABELS = {
    "avcorr": "AVCorr: motion against sound onsets",
    "toy_f1": "F1: clicks heard against impacts seen",
    "psnr": "PSNR in dB",
    "psnr_pooled": "PSNR of each clip as a whole, in dB",
    "psnr_identical": "identical frames, share",
    "ssim": "SSIM",
    "lpips": "LPIPS (lower is better)",
    "flicker": "change from frame to frame, of 255",
    "flicker_error": "flicker error, of 255 (lower is better)",
}
COLUMNS = {  # of scores, with what has to be said of them
    "generated": "",
    "baseline": "baseline: what was given, without the model",
    "mismatched": (
        "mismatched: the same pictures beside the sound of other clips, the level of chance"
    ),
    "real": "",
}


class Entry(NamedTuple):
    """One clip of a page: a name, what is said of it, the player's file and its strip (PNG)."""

    name: str
    caption: str
    clip: bytes | Path | None = None  # mp4 or wav as bytes, or a file that browsers play
    strip: bytes | None = None


def score_rows(
    generated: Mapping[str, float],
    real: Mapping[str, float] | None = None,
    baseline: Mapping[str, float] | None = None,
) -> dict[str, dict[str, float]]:
    """Scores with a level of chance (`x` beside `x_mismatched`) or a baseline as rows of COLUMNS.

    All three are what metrics such as `metrics.sync.Sync` say of each set.
    """
    end, baseline = "_mismatched", baseline or {}
    chance = {k.removesuffix(end): v for k, v in generated.items() if k.endswith(end)}
    sides = {"generated": generated, "baseline": baseline, "mismatched": chance, "real": real or {}}
    return {
        key: {name: side[key] for name, side in sides.items() if key in side}
        for key in generated
        if key in chance or not _missing(baseline.get(key))
    }


def columns(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Those of COLUMNS that any row has, in their order."""
    return [name for name in COLUMNS if any(name in row for row in rows.values())]


def player(clip: bytes | Path, attributes: str = "controls") -> str:
    """A looping player with the clip inside, so that picture and sound play wherever it is."""
    kind, data = _media(clip)
    source = f"data:{kind};base64,{b64encode(data).decode()}"
    if kind.startswith("video"):
        return f'<video loop playsinline preload="auto" {attributes} src="{source}"></video>'
    if kind.startswith("audio"):
        return f'<audio loop preload="auto" controls src="{source}"></audio>'
    return f'<img alt="" src="{source}">'


def clip_html(entry: Entry) -> str:
    """The entry's player, silent until clicked; nothing if it has no clip."""
    if entry.clip is None:
        return ""
    attributes = f'controls muted aria-label="{escape(entry.name)}, with sound"'
    return f"<div class=clip>{player(entry.clip, attributes)}</div>"


def strip_html(entry: Entry) -> str:
    """The entry's strip, enlarged when clicked; nothing if it has none."""
    if entry.strip is None:
        return ""
    source = f"data:image/png;base64,{b64encode(entry.strip).decode()}"
    alt = f"frames, waveform and spectrogram of {escape(entry.name)}"
    return f'<button class=strip title="enlarge"><img alt="{alt}" src="{source}"></button>'


def table_html(facts: Mapping[str, object]) -> str:
    """Names beside values; nothing if there are none."""
    rows = "".join(
        f"<tr><th scope=row>{escape(str(key))}<td>{escape(_plain(value))}"
        for key, value in facts.items()
    )
    return f"<table class=settings>{rows}</table>" if rows else ""


def fitting(cards: Iterable[str], limit: int) -> list[str]:
    """The first cards, of at most `limit` bytes together; no later one is made."""
    shown, size = [], 0
    for card in cards:
        size += len(card)
        if size > limit:
            break
        shown.append(card)
    return shown


def page_html(title: str, body: str, style: str = "") -> str:
    """A page of players and strips: their looks and behaviour, and `style` on top."""
    icons = STYLE.replace("OFF", _icon(CROSS)).replace("ON", _icon(WAVES))
    return PAGE.format(title=escape(title), style=icons + style, body=body, script=SCRIPT)


def gallery_html(
    title: str,
    entries: Sequence[Entry],
    *,
    settings: Mapping[str, object] | None = None,
    scores: Mapping[str, Mapping[str, float]] | None = None,
    limit: int = LIMIT,
) -> str:
    """A page of looping players, each with its caption and its strip, over settings and scores.

    `scores`: row to numbers of COLUMNS, see `score_rows`. Once the media would exceed
    `limit` bytes the remaining clips are counted instead of shown.
    """
    cards = fitting(map(_card, entries), limit)
    count = f"{len(entries)} clip{'s' * (len(entries) != 1)}"
    body = f"<header><h1>{escape(title)}</h1>"
    body += f"<p>{count} · click a clip to hear it, a strip to enlarge it</p></header>"
    body += f"<section class=facts>{_scores(scores or {})}{table_html(settings or {})}</section>"
    body += "<main>\n" + "\n".join(cards) + "\n</main>"
    if left := len(entries) - len(cards):
        body += f"<p class=more>{left} more in this folder, left out to keep the page small.</p>"
    return page_html(title, body)


def _card(entry):
    name, caption = escape(entry.name), escape(entry.caption)
    return (
        f'<figure id="{name}">{clip_html(entry)}{strip_html(entry)}'
        f"<figcaption><b>{name}</b> {caption}</figcaption></figure>"
    )


def _media(clip):
    if isinstance(clip, bytes):
        return ("audio/wav" if clip.startswith(b"RIFF") else "video/mp4"), clip
    kinds = {".mp4": "video/mp4", ".webm": "video/webm", ".wav": "audio/wav", ".gif": "image/gif"}
    return kinds[clip.suffix], clip.read_bytes()


def _scores(scores):
    if not scores:
        return ""
    shown, body = columns(scores), ""
    head = "".join(f"<th scope=col>{c}" for c in shown)
    for key, row in scores.items():
        whole = max([1, *(value for value in row.values() if not _missing(value))])  # of bars
        cells = "".join(f"<td>{_number(row.get(c))}{_bar(row.get(c), whole)}" for c in shown)
        body += f"<tr><th scope=row>{escape(LABELS.get(key, key))}{cells}"
    note = "; ".join(COLUMNS[c] for c in shown if COLUMNS[c])
    return f"<table class=scores><caption>{note}</caption><tr><td>{head}{body}</table>"


def _plain(value):
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return "none" if value is None else str(value)


def _number(value):
    return "–" if _missing(value) else f"{value:.3f}"


def _missing(value):
    return value is None or math.isnan(value)


def _bar(value, whole):
    share = 0 if _missing(value) else min(max(value / whole, 0), 1)
    return f'<i style="width:{100 * share:.0f}%"></i>'


def _icon(beside):
    shape = f"M3 9v6h4l5 4V5L7 9z{beside}"
    svg = "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 24 24' fill='none' stroke='white' "
    svg += f"stroke-width='1.8' stroke-linejoin='round' stroke-linecap='round'><path d='{shape}'/>"
    return f'url("data:image/svg+xml,{quote(svg + "</svg>")}")'


PAGE = """<!doctype html>
<html lang=en><head><meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1"><title>{title}</title>
<style>{style}</style></head><body>
{body}
<dialog><img alt=""></dialog>
<script>{script}</script></body></html>
"""

CROSS, WAVES = "M16 9l6 6M22 9l-6 6", "M16 8q3 4 0 8M19 5q5 7 0 14"
STYLE = """
:root{color-scheme:light dark;--ground:#f6f6f4;--card:#fff;--ink:#1d2025;--soft:#6a707a;
--line:#e2e2de;--accent:#2f6fde}
@media(prefers-color-scheme:dark){:root{--ground:#0e1013;--card:#171a20;--ink:#e4e7ec;
--soft:#8d95a3;--line:#282d36;--accent:#6cb6ff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:32px 24px 64px;background:var(--ground);
color:var(--ink);font:15px/1.45 system-ui,sans-serif}
h1{font-size:22px;font-weight:650;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
header p,.more{color:var(--soft);margin:4px 0 24px}
.facts{display:flex;flex-wrap:wrap;gap:16px 48px;align-items:flex-start;margin-bottom:28px}
table{border-collapse:collapse;font-size:13.5px}
th{font-weight:400;text-align:left;color:var(--soft);padding:4px 20px 4px 0}
td{padding:4px 20px 4px 0;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
tr+tr{border-top:1px solid var(--line)}
caption{caption-side:bottom;text-align:left;color:var(--soft);font-size:12px;padding-top:6px}
.scores td{min-width:96px;font-size:16px}
.scores i{display:block;height:3px;border-radius:2px;background:var(--accent);margin-top:2px}
.scores td+td i{background:var(--soft);opacity:.6}
main{display:grid;gap:18px;grid-template-columns:repeat(auto-fill,minmax(250px,1fr))}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;
overflow:hidden}
.clip{position:relative;background:#000;line-height:0}
video,.clip img{width:100%;image-rendering:pixelated;cursor:pointer}
.clip audio{width:100%;margin:12px 0}
.live::after{content:"";position:absolute;right:8px;bottom:8px;width:28px;height:28px;
border-radius:7px;background:OFF center/18px no-repeat #000a;pointer-events:none}
.live.on::after{background-image:ON}
.live.on{outline:2px solid var(--accent);outline-offset:-2px}
.strip{display:block;width:100%;border:0;padding:0;background:none;cursor:zoom-in}
.strip img{display:block;width:100%}
figcaption{padding:8px 12px 10px;font-size:13px;color:var(--soft);overflow-wrap:anywhere}
figcaption b{color:var(--ink);font-weight:600;margin-right:6px}
dialog{border:0;padding:0;background:none;max-width:96vw;max-height:96vh}
dialog::backdrop{background:#000c}
dialog img{display:block;width:min(96vw,1536px);cursor:zoom-out;border-radius:6px}
"""

SCRIPT = """
const still = matchMedia('(prefers-reduced-motion: reduce)').matches;
const clips = [...document.querySelectorAll('video')];
const quiet = v => { v.muted = true; v.parentElement.classList.remove('on'); };
const seen = new IntersectionObserver(all => all.forEach(({target: v, isIntersecting: shown}) => {
  if (!shown) { v.pause(); quiet(v); } else if (!still) v.play().catch(() => {});
}));
clips.forEach(v => {
  v.controls = false;
  v.parentElement.classList.add('live');
  const smooth = () => { if (v.videoWidth >= 160) v.style.imageRendering = 'auto'; };
  if (v.readyState) smooth(); else v.onloadedmetadata = smooth;
  v.tabIndex = 0;
  v.onkeydown = e => { if (e.key === 'Enter' || e.key === ' ') { e.preventDefault(); v.click(); } };
  v.onclick = () => {
    const loud = v.muted || v.paused;
    clips.forEach(quiet);
    if (!loud) return still && v.pause();
    v.muted = false; v.currentTime = 0; v.parentElement.classList.add('on'); v.play();
  };
  seen.observe(v);
});
const box = document.querySelector('dialog');
box.onclick = () => box.close();
document.querySelectorAll('.strip').forEach(b => b.onclick = () => {
  const { src, alt } = b.firstElementChild;
  Object.assign(box.firstElementChild, { src, alt });
  box.showModal();
});
"""

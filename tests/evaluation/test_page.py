"""A report as a page: all of it inside, nothing of it outside, and charts that are to scale."""

import re
from collections import Counter
from copy import deepcopy
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_report import figure, small_entries, small_report

from avdiffusion.evaluation import charts
from avdiffusion.evaluation.page import STYLE, report_html
from avdiffusion.gallery import STYLE as GALLERY_STYLE
from avdiffusion.gallery import Entry

pytest.importorskip("av")
NUMBERS = st.floats(-1e6, 1e6) | st.none()
EVIL = """</script><script>alert("1")</script><img src=x onerror='alert(1)'>&amp;"""


@pytest.fixture(scope="module")
def entries():
    return small_entries()


@pytest.fixture(scope="module")
def html(entries):
    return report_html(small_report(), entries)


class Tags(HTMLParser):
    """Every element with its attributes, and the text of the page."""

    def __init__(self, html):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def of(self, name):
        return [attributes for tag, attributes in self.found if tag == name]


def test_page_needs_nothing_else(html):
    assert not re.search(r'(src|href)=(?!"data:|"#)|https?://|@import|<link', html)


def test_page_tells_what_was_measured(html):
    text = Tags(html).text
    for part in (
        *(
            "Small",
            "80 clips of ours (8f14e45fceea) against 96 clips of data/held_out",
            "resize filter",
        ),
        *("protocol default", "80 clips are few", "runs/ours", "c9f0f895fb98ab91", "evaluate.py"),
        *("9.81 to 13.4", "0.620 N 48", "80 / 96", "I3D (weights 9a1f) · 2 notes", "no bias"),
        *("62.0 ms", "its power is 0.52, below 0.7", "no clip has sound", "avdiffusion 0.1.0"),
    ):
        assert part in text
    assert "Nothing" not in text  # a group without figures
    assert "1.000, 1.000" not in text  # scores clip by clip stand with the clips


def test_main_figures_stand_on_top(html):
    tiles = re.findall(r'<div class="(tile[^"]*)"><h3>(\w+)', html)
    assert tiles == [("tile", "KVD"), ("tile weak", "AVCORR")]
    assert html.index('class="tile') < html.index("<table")


def test_the_first_figure_of_each_group_is_main_unless_said_otherwise():
    report = small_report()
    del report["main"]
    assert re.findall(r'class="tile[^>]*><h3>(\w+)', report_html(report, {})) == ["KVD", "AVCORR"]
    assert "tile" not in re.sub(r"<style>.*</style>", "", report_html({}, {}), flags=re.DOTALL)


def test_weak_figures_are_grey(html):
    assert re.findall(r'<tbody class="one( weak)?"><tr><th scope=row>(\w+)', html) == [
        ("", "KVD"),
        ("", "FAD"),
        (" weak", "AVCORR"),
        ("", "OFFSET"),
        ("", "SILENT"),
    ]


def test_columns_that_say_nothing_are_left_out(html):
    one, two = html.split("<table class=figures>")[1:]
    heads = [re.findall(r"<th scope=col[^>]*>([^<]+)", table) for table in (one, two)]
    assert heads[0] == ["Figure", "Value", "Real against real", "Clips"]
    assert heads[1] == ["Figure", "Value", "Chance", "Real", "Power", "Clips"]


def test_the_same_lag_curve_is_drawn_once(html):
    assert html.count("class=wide") == 1


def test_samples_stand_over_their_nearest_clips(html):
    """The most suspicious first; of a clip that is nearest by two measures one player."""
    cards = html.split("<figure class=card>")[1:]
    names = [re.findall(r"<div class=band><p><span>(.*?)</span>", card) for card in cards]
    assert names == [
        ["<b>000002</b>", "nearest by i3d: <b>b</b>", "nearest by yamnet: <b>b</b>"],
        ["<b>000000</b>", "nearest by i3d: <b>a</b>"],
        ["<b>000001</b>"],
    ]
    assert [card.count("<video") for card in cards] == [2, 2, 1]
    assert [card.count("<img") for card in cards[:2]] == [2, 2]
    assert "ratio <b>0.410</b>" in cards[0]
    assert "sound <b>200 ms late</b>" in cards[0]
    assert "late" not in cards[2].split("</figure>")[0]
    assert "1 more samples" in html  # it has scores and no player


def test_page_stays_below_its_limit(entries):
    whole = report_html(small_report(), entries)
    first = len(whole.split("<figure class=card>")[1])
    html = report_html(small_report(), entries, limit=int(1.2 * first))
    assert html.count("<figure class=card>") == 1
    assert len(html) < len(whole) - first
    assert "3 more samples, left out" in html


def everywhere(value, evil):
    """The report with `evil` behind every text but those that the page looks up."""
    if isinstance(value, dict):
        kept = ("better", "key")
        return {k: v if k in kept else everywhere(v, evil) for k, v in value.items()}
    if isinstance(value, list):
        return [everywhere(v, evil) for v in value]
    return value + evil if isinstance(value, str) else value


def test_no_text_becomes_a_part_of_the_page(entries):
    def page(evil):
        named = {name + evil: Entry(e.name + evil, "", *e[2:]) for name, e in entries.items()}
        report = everywhere(small_report(), evil)
        report["clips"][0]["scores"] |= {f"a{evil}": 1.0}
        report["groups"][0]["figures"][0]["details"] = {f"a{evil}": {f"b{evil}": f"c{evil}"}}
        return Tags(report_html(report, named))

    harmless, harmful = page(" and so on"), page(EVIL)
    assert [tag for tag, _ in harmless.found] == [tag for tag, _ in harmful.found]
    assert [[*a] for _, a in harmless.found] == [[*a] for _, a in harmful.found]
    assert harmful.text.count(EVIL) >= 40


@pytest.mark.parametrize("part", [*small_report(), None])
def test_any_part_may_be_missing(part, entries):
    report = small_report()
    report.pop(part, None)
    assert "<h1>" in report_html(report, entries if part else {})
    emptied = {**small_report(), part: None} if part else {}
    assert "<h1>" in report_html(emptied, {})


def test_page_can_be_read_by_everybody(html):
    tags = Tags(html)
    assert all(th.get("scope") in ("row", "col") for th in tags.of("th"))
    assert all("alt" in img for img in tags.of("img"))
    assert all(img["alt"] for img in tags.of("img") if "src" in img)
    assert all(video["aria-label"] for video in tags.of("video"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in tags.of("svg"))
    ids = Counter(a["id"] for _, a in tags.found if "id" in a)
    assert set(ids.values()) == {1}
    assert {a["href"][1:] for a in tags.of("a")} == set(ids)


def luminance(colour):
    colour = colour if len(colour) == 6 else "".join(2 * c for c in colour)
    parts = [int(colour[k : k + 2], 16) / 255 for k in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_texts_stand_out(dark):
    """WCAG 2.1: a contrast of 4.5 for texts, 3 for what is drawn."""
    colours = {}
    for style in (GALLERY_STYLE, STYLE):
        blocks = re.findall(r":root\{([^}]*)\}", style)  # light, then what is other in the dark
        for block in blocks[: 1 + dark]:
            colours |= dict(re.findall(r"--(\w+):#(\w+)", block))

    def contrast(front, back):
        high, low = sorted((luminance(colours[front]), luminance(colours[back])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    assert contrast("warn", "warnground") >= 4.5
    for back in ("ground", "card"):
        for front in ("ink", "soft"):
            assert contrast(front, back) >= 4.5, (front, back)
        for front in ("accent", "real", "motion", "onset"):
            assert contrast(front, back) >= 3, (front, back)


def paths(svg, name):
    """Points of the path of a class."""
    (path,) = re.findall(rf'<path class="?{name}"? [^>]*d="([^"]*)"', svg)
    return [tuple(map(float, point.split())) for point in re.findall(r"-?[\d.]+ -?[\d.]+", path)]


def test_interval_chart_is_to_scale():
    svg = charts.interval_chart(6, low=4, high=8, real=1, chance=10)
    at = {
        "value": float(re.search(r'cx="([\d.]+)"', svg)[1]),
        "low": float(re.search(r'range .*?d="M([\d.]+)', svg)[1]),
        "high": float(re.search(r"range .*?H([\d.]+)", svg)[1]),
        "real": paths(svg, "real")[0][0],
        "chance": paths(svg, "chance")[0][0],
    }
    zero, step = 6, (charts.WIDTH - 12) / 10
    for name, x in {"value": 6, "low": 4, "high": 8, "real": 1, "chance": 10}.items():
        assert at[name] == pytest.approx(zero + x * step, abs=0.1), name
    assert "value 6.00, 95 % interval 4.00 to 8.00, real clips 1.00, chance 10.0" in svg


def test_a_value_alone_needs_no_chart():
    assert charts.interval_chart(6) == charts.interval_chart(None, low=1, high=2) == ""


def test_curves_show_the_lag():
    found = deepcopy(small_report()["clips"][0]["curves"])
    svg = charts.curves(*(found[k] for k in ("time", "motion", "onset")), lag=0.2, seconds=1.6)
    seen, heard = (x for x, _ in paths(svg, "mark"))
    assert seen == pytest.approx(100 * 0.5 / 1.6, abs=0.01)  # where the motion is strongest
    assert heard - seen == pytest.approx(100 * 0.2 / 1.6, abs=0.02)
    motion, onset = (paths(svg.replace(" fill", "-fill"), k) for k in ("motion", "onset"))
    assert min(motion, key=lambda p: p[1]) == pytest.approx((seen, 4), abs=0.01)
    assert max(y for _, y in motion) == 50 == min(y for _, y in onset)
    assert "the sound 200 ms late" in svg


def test_lag_curve_marks_its_greatest_value():
    svg = charts.lag_curve([-0.2, -0.1, 0, 0.1, 0.2], [0, 0.1, 0.2, 0.4, -0.1])
    (x, top), *_ = paths(svg, "mark")
    assert (x, top) == (75, 0)
    assert [y for _, y in paths(svg, "lag")] == pytest.approx([80, 60, 40, 0, 100])
    assert "100 ms late" in svg
    assert re.findall(r"left:([\d.]+)%\">([^<]+)", svg)[1:4] == [
        ("25.00", "-100 ms"),
        ("50.00", "0 ms"),
        ("75.00", "+100 ms"),
    ]


def test_lag_curve_lies_over_the_band_of_mismatched_pairs():
    svg = charts.lag_curve([-1, 0, 1], [0, 1, 0], low=[-1, -1, -1], high=[0.5, 0.5, 0.5])
    band = paths(svg, "band")
    assert band == [(0, 100), (50, 100), (100, 100), (100, 25), (50, 25), (0, 25)]


def test_late_in_words():
    assert [charts.late(x) for x in (0, 0.0001, 0.12, -0.04)] == [
        *("on time", "on time", "120 ms late", "40 ms early")
    ]


def numbers(svg):
    """All coordinates of all paths."""
    return [float(x) for d in re.findall(r' d="([^"]*)"', svg) for x in re.findall(r"-?[\d.]+", d)]


@given(
    st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12),
    st.floats(-0.5, 0.5) | st.none(),
)
def test_curves_stay_in_their_frame(pairs, lag):
    """Of any numbers, missing ones and all the same."""
    first, second = ([p[k] for p in pairs] for k in (0, 1))
    time = [0.1 * (k + 1) for k in range(len(pairs))]
    lags = [0.1 * (k - len(pairs) // 2) for k in range(len(pairs))]
    for svg in (
        charts.curves(time, first, second, lag=lag),
        charts.lag_curve(lags, first, low=second, high=second),
    ):
        assert all(-0.01 <= x <= 100.01 for x in numbers(svg))
        assert "nan" not in svg


@given(st.lists(NUMBERS, min_size=4, max_size=4))
def test_interval_chart_stays_in_its_frame(values):
    value, low, high, real = values
    svg = charts.interval_chart(value, low=low, high=high, real=real)
    found = [float(x) for x in re.findall(r'cx="([^"]*)"', svg)]
    assert all(0 <= x <= charts.WIDTH for x in found + numbers(svg))
    assert bool(found) == (value is not None and (real is not None or None not in (low, high)))


def test_a_figure_without_notes_has_nothing_to_open():
    html = report_html({"groups": [{"title": "A", "figures": [figure("a", 1.0)]}]}, {})
    assert html.count("<details>") == 1  # every field, at the end

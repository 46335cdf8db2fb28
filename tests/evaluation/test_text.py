"""A report as Markdown: what stands in its tables, and that any text stays in its cell."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_report import figure, small_report

from avdiffusion.evaluation.report import plain, told
from avdiffusion.evaluation.text import (
    conditions,
    counts,
    figure_rows,
    floor,
    interval,
    number,
    report_markdown,
    short,
    weak,
    with_unit,
)
from avdiffusion.metrics.metric import Figure


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (None, 3, "–"),
        (float("nan"), 3, "–"),
        (0, 3, "0.00"),
        (0.5, 3, "0.500"),
        (-0.02134, 3, "-0.0213"),
        (12.345, 3, "12.3"),
        (99.96, 3, "100"),
        (1243.7, 3, "1244"),
        (1243.7, 4, "1244"),
        (184.45, 4, "184.4"),
        (0.00002134, 3, "2.13e-5"),
    ],
)
def test_number(value, digits, text):
    assert number(value, digits) == text


@given(st.floats(-1e9, 1e9), st.integers(2, 5))
def test_number_keeps_its_digits(value, digits):
    """Half a unit of the last digit is lost at most, or of a whole number."""
    error = max(0.5 * 10.0 ** (1 - digits) * abs(value), 1e-320)
    error = max(error, 0.5) if abs(value) >= 10 ** (digits - 1) else error
    assert abs(float(number(value, digits)) - value) <= error * 1.0001


def test_parts_of_a_figure():
    kvd = small_report()["groups"][0]["figures"][0]
    assert with_unit(figure("a", 62.0, unit="ms")) == "62.0 ms"
    assert with_unit(kvd) == "11.5"
    assert (interval(kvd), interval(kvd, 4)) == ("9.81 to 13.4", "9.810 to 13.40")
    assert interval(figure("a", 1.0, low=0.5)) == ""
    assert (floor(kvd), floor(figure("a", 1.0))) == ("0.620 (N 48)", "")
    assert (counts(kvd), counts(figure("a", 1.0)), counts({"n": 0})) == ("80 / 96", "80", "–")


@pytest.mark.parametrize("power", [0.52, 0.699])
def test_a_weak_figure_is_said_to_be_so(power):
    one = figure("a", 1.0, power=power)
    assert "says nothing" in weak(one)
    assert "says nothing" in report_markdown({"groups": [{"title": "A", "figures": [one]}]})


@pytest.mark.parametrize("power", [None, 0.7, 0.99])
def test_a_strong_figure_is_not(power):
    one = figure("a", 1.0, power=power)
    assert weak(one) == ""
    assert "nothing" not in report_markdown({"groups": [{"title": "A", "figures": [one]}]})


def test_conditions_name_both_sets_and_how_they_were_read():
    assert conditions(small_report()) == (
        "80 clips of ours (8f14e45fceea) against 96 clips of data/held_out (c9f0f895fb98); fps 10; "
        "size 32 × 32; resize filter area; sample rate 8000; codec read: arrays against vp9 + opus"
    )


def test_conditions_say_once_what_is_the_same_and_nothing_of_what_is_absent():
    report = small_report()
    report["sets"]["reference"]["lines"] = [["codec read", "arrays"]]
    assert conditions(report).endswith("; codec read: arrays")
    del report["sets"]["reference"], report["protocol"]
    assert conditions(report) == "80 clips of ours (8f14e45fceea); codec read: arrays"
    assert conditions({}) == ""


def table_of(text, title):
    """Rows of cells of the table below a title; a cell ends at a bar that is not escaped."""
    part = text.split(f"## {title}\n\n")[1].split("\n\n")[0]
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in part.splitlines()
    ]


def test_every_distance_carries_what_it_depends_on():
    head, _, *rows = table_of(report_markdown(small_report()), "Distances")
    assert [row[0] for row in rows] == ["KVD ↓", "FAD ↓"]
    for row, value, real in zip(rows, ("11.52", "2.913"), ("0.6200", "0.9100"), strict=True):
        cells = dict(zip(head, row, strict=True))
        assert cells["Value"] == value
        assert cells["Real against real"] == f"{real} (N 48)"
        assert cells["N"] == "80 / 96"
        for text in ("held_out", "c9f0f895fb98", "fps 10", "32 × 32", "area", "vp9 + opus"):
            assert text in cells["Read as"]


def test_columns_that_say_nothing_are_left_out():
    head, rows = figure_rows(small_report()["groups"][1], {})
    assert head == ["Figure", "Value", "95 % interval", "Chance", "Real", "Power", "N"]
    assert rows[0][2:] == ["0.1800 to 0.2500", "0.01000", "0.3100", rows[0][5], "80"]
    assert rows[2] == ["SILENT", "–", "", "", "", "", "–"]


def test_notes_warnings_pairs_and_command_are_told():
    text = report_markdown(small_report())
    assert "- KVD: no bias\n- KVD: of 3" in text
    assert "> **Warning:** 80 clips are few" in text
    assert "protocol default · 2026-11-30 14:02 · avdiffusion 0.1.0 · measured in 12 s" in text
    rows = table_of(text, "Nearest training clips")
    assert rows[2] == ["000002", "b", "i3d", "1.50", "0.410"]
    assert "    python evaluate.py samples=a reference=b\n" in text


def test_of_many_pairs_the_others_are_counted():
    pairs = [{"sample": f"{i}", "neighbour": "a", "distance": i} for i in range(33)]
    text = report_markdown({"pairs": pairs})
    assert len(table_of(text, "Nearest training clips")) == 2 + 20
    assert "13 more in report.json." in text


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_stays_in_its_cell(label, name):
    report = small_report()
    report["groups"][0]["figures"][0]["label"] = label
    report["sets"]["reference"]["name"] = name
    rows = table_of(report_markdown(report), "Distances")
    assert len(rows) == 4
    assert {len(row) for row in rows} == {7}
    assert not re.search(r"(?<!\\)[<>]", "".join(rows[2]))


def test_a_report_of_nothing_is_one():
    assert report_markdown({}).startswith("# Evaluation\n")


def test_details_are_cut_but_counted():
    assert short([0.5] * 40).endswith("0.5000, … (40 in all)")
    assert short({"a": [1, 2], "b": None, "c": 0.123456}) == "a 1, 2; b –; c 0.1235"


def test_a_power_that_cannot_be_had_is_weak_too():
    unknown = plain(told(Figure(key="a", label="A", value=0.5, power=float("nan"))))
    assert unknown["power"] is None
    assert "finds nothing in real clips" in weak(unknown)
    assert weak(plain(told(Figure(key="a", label="A", value=0.5)))) == ""

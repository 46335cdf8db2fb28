"""Strips, contact sheets and the page that holds clips."""

import re
from base64 import b64decode
from io import BytesIO

import numpy as np
import pytest

from avdiffusion import io
from avdiffusion.gallery import Entry, fitting, gallery_html, score_rows
from avdiffusion.strip import contact_sheet, strip

av = pytest.importorskip("av")
FPS, RATE = 10, 8000


def clip(seconds=1.6, size=32, channels=1):
    """A flash and a beep in the middle."""
    frames, samples = round(FPS * seconds), round(RATE * seconds)
    video = np.full((3, frames, size, size), 20, np.uint8)
    video[:, frames // 2] = 255
    audio = np.zeros((channels, samples), np.float32)
    beep = slice(samples // 2, samples // 2 + RATE // 20)
    audio[:, beep] = 0.8 * np.sin(2 * np.pi * 900 * np.arange(RATE // 20) / RATE)
    return video, audio


def test_strip_shares_one_time_axis():
    picture = np.asarray(strip(*clip(), fps=FPS, sample_rate=RATE)).astype(int)
    width = picture.shape[1]
    flash = np.flatnonzero(picture[30].min(-1) > 200)
    wave = np.flatnonzero(picture[68:120, :, 2].max(0) > 200)
    spectrum = 99 + np.flatnonzero(picture[130:210, 99:].max((0, 2)) > 150)  # right of the label
    assert abs(flash.min() - width / 2) <= 1
    assert flash.max() - flash.min() >= width / 16 - 3
    assert abs(wave.min() - width / 2) <= 2
    assert wave.min() - 12 <= spectrum.min() <= wave.min()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("size", [8, 32, 64, 100, 256])
def test_strip_of_any_size_fits_a_page(size, channels):
    picture = strip(*clip(size=size, channels=channels), fps=FPS, sample_rate=RATE)
    assert 512 <= picture.width <= 1024
    assert picture.height < 500


def test_strip_with_a_modality_missing():
    video, audio = clip()
    both = strip(video, audio, fps=FPS, sample_rate=RATE)
    assert strip(video, fps=FPS).height < both.height
    assert strip(audio=audio, sample_rate=RATE).height < both.height
    with pytest.raises(ValueError, match="needs video or audio"):
        strip()
    with pytest.raises(ValueError, match="rate"):
        strip(video)


def test_strip_of_silence_and_of_one_frame():
    strip(clip()[0][:, :1], np.zeros((1, 800), np.float32), fps=FPS, sample_rate=RATE)


def test_strip_of_a_long_clip_shows_every_click():
    """A second has 17 columns here: no click falls between two of them."""
    audio = np.zeros((1, 60 * RATE), np.float32)
    clicks = np.arange(0.73, 60, 1.37)
    for time in clicks:
        at = int(time * RATE)
        audio[0, at : at + 80] = 0.5 * np.sin(2 * np.pi * 1500 * np.arange(80) / RATE)
    video = clip(60)[0]
    picture = np.asarray(strip(video, audio, fps=FPS, sample_rate=RATE)).astype(int)
    assert picture.shape[1] == 1024
    bright = picture[140:220].max((0, 2))
    for time in clicks:
        column = int(time / 60 * 1024)
        assert bright[column - 1 : column + 2].max() > 150
    assert np.median(bright) < 60
    contact_sheet([strip(video, audio, fps=FPS, sample_rate=RATE), strip(*clip(), fps=FPS)])


def test_contact_sheet_shows_every_strip():
    one = strip(*clip(), fps=FPS, sample_rate=RATE)
    assert contact_sheet([one] * 3, ["a", "b", "c"]).height > 3 * one.height
    assert contact_sheet([one] * 8).width > 2 * one.width


def page(count=3, **options):
    video, audio = clip()
    mp4 = io.mp4_bytes(video, audio, fps=FPS, sample_rate=RATE)
    png = BytesIO()
    strip(video, audio, fps=FPS, sample_rate=RATE).save(png, "PNG")
    entries = [Entry(f"{i:06d}", "seed 0", mp4, png.getvalue()) for i in range(count)]
    return gallery_html("a <run>", entries, **options)


def test_page_holds_clips_that_play_with_sound():
    html = page(settings={"sampler": {"steps": 50}, "seed": 0})
    clips = re.findall(r'<video [^>]*loop[^>]* src="data:video/mp4;base64,([^"]+)"', html)
    assert len(clips) == 3
    with av.open(BytesIO(b64decode(clips[0]))) as file:
        assert file.streams.video[0].frames == 16
        sound = np.concatenate([f.to_ndarray() for f in file.decode(audio=0)], 1)
    assert np.abs(sound).max() > 0.5
    assert html.count("data:image/png;base64,") == 3


def test_page_needs_nothing_else():
    html = page()
    assert "a &lt;run&gt;" in html
    assert "<run>" not in html
    assert "prefers-color-scheme:dark" in html
    assert not re.search(r'(src|href)=(?!"data:)|https?://|@import|<link', html)


def test_page_shows_scores_and_settings():
    scores = score_rows(
        {
            "avcorr": 0.41,
            "avcorr_mismatched": 0.03,
            "offset": 0.1,
            "toy_f1": 0.6,
            "toy_f1_mismatched": 0.2,
        },
        {"avcorr": 0.66, "toy_f1": float("nan")},
    )
    assert list(scores) == ["avcorr", "toy_f1"]
    html = page(scores=scores, settings={"checkpoint": "last.ckpt", "guides": []})
    for text in ("0.410", "0.030", "0.660", "–", "last.ckpt", "mismatched", "real"):
        assert text in html


def test_page_shows_scores_beside_a_baseline():
    nan = float("nan")
    scores = score_rows(
        {"psnr": 20.0, "flicker_error": nan, "flicker": 2.0, "other": 1.0},
        {"flicker": 3.0},
        {"psnr": 25.0, "flicker_error": nan, "flicker": 1.0, "missing": 1.0},
    )
    assert scores == {
        "psnr": {"generated": 20.0, "baseline": 25.0},
        "flicker": {"generated": 2.0, "baseline": 1.0, "real": 3.0},
    }
    html = page(scores=scores)
    assert re.findall("<th scope=col>(\\w+)", html) == ["generated", "baseline", "real"]
    row = html.partition("PSNR in dB")[2].partition("<tr>")[0]
    assert re.findall(r"<td>(.+?)<i style=\"width:(\d+)%", row) == [
        ("20.000", "80"),
        ("25.000", "100"),
        ("–", "0"),
    ]


def test_page_stays_below_its_limit():
    whole = page(4)
    html = page(4, limit=len(whole) // 2)
    assert len(html) < 0.7 * len(whole)
    assert "more in this folder" in html


def test_sound_alone_gets_a_player(tmp_path):
    path = io.write_wav(tmp_path / "a.wav", clip()[1], sample_rate=RATE)
    for one in (path, path.read_bytes()):
        html = gallery_html("sounds", [Entry("a", "", one)])
        assert re.search(r'<audio [^>]*controls src="data:audio/wav;base64,UklGR', html)
        assert "<video" not in html


def test_cards_are_made_only_as_far_as_they_fit():
    made = []

    def cards():
        for length in (5, 4, 3, 1):
            made.append(length)
            yield "x" * length

    assert fitting(cards(), 10) == ["xxxxx", "xxxx"]
    assert made == [5, 4, 3]

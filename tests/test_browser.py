"""Pages as people meet them: in Chromium, from a file, wide and narrow, by day and by night."""

import os
from io import BytesIO

import numpy as np
import pytest
from chromium import BINARY, chromium
from media_files import make_media
from PIL import Image
from small_report import small_entries, small_report

from avdiffusion import io
from avdiffusion.evaluation.page import report_html
from avdiffusion.gallery import Entry, gallery_html

pytest.importorskip("av")
pytestmark = pytest.mark.slow
WINDOWS = {"wide": (1280, False), "narrow": (390, False), "wide, dark": (1280, True)}
PLAY = """(async name => {
  const player = document.querySelector(`[data-test="${name}"]`);
  player.scrollIntoView({block: 'center'});
  await new Promise(shown => setTimeout(shown, 100));
  player.muted = false;
  player.loop = true;
  await player.play();
  const begin = player.currentTime, late = Date.now() + 10000;
  while (Math.abs(player.currentTime - begin) < 0.2 && Date.now() < late)
    await new Promise(soon => setTimeout(soon, 20));
  const file = await (await fetch(player.src)).arrayBuffer();
  const wave = (await new OfflineAudioContext(1, 1, 8000).decodeAudioData(file)).getChannelData(0);
  return {
    peak: wave.reduce((most, x) => Math.max(most, Math.abs(x)), 0),
    moved: Math.abs(player.currentTime - begin), seconds: player.duration, error: player.error,
    width: player.videoWidth, frames: player.webkitDecodedFrameCount,
    sound: player.webkitAudioDecodedByteCount, shown: player.getBoundingClientRect().width,
  };
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BINARY is None:
        missing = "no Chromium: apt-get install chromium"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The report and the gallery, with clips of ours, a camera's file and sound alone."""
    folder = tmp_path_factory.mktemp("pages")
    camera = make_media(folder / "camera.mp4", seconds=1.5, size=(120, 160)).path
    wave = 0.5 * np.sin(np.arange(12000)[None] / 5).astype(np.float32)
    sound = io.write_wav(folder / "sound.wav", wave, sample_rate=8000)
    entries = small_entries()
    entries["camera"] = Entry("camera", "a file", camera)
    entries["sound"] = Entry("sound", "alone", sound.read_bytes())
    found = {"report": folder / "report.html", "gallery": folder / "gallery.html"}
    found["report"].write_text(report_html(small_report(), entries))
    settings = {"seed": 0, "sampler": {"steps": 50}}
    found["gallery"].write_text(gallery_html("Run", list(entries.values()), settings=settings))
    return found


@pytest.fixture(params=["report", "gallery"])
def page(browser, pages, request):
    """Opened; at the end nothing may have gone wrong, and nothing else been asked for."""
    path = pages[request.param]
    browser.open(path)
    yield browser
    assert browser.errors == []
    asked = {url for url in browser.requests if not url.startswith("data:")}
    assert asked == {path.resolve().as_uri()}


def test_every_clip_plays_with_its_sound(page):
    count = page.run(
        "[...document.querySelectorAll('video, audio')].map((p, k) => p.dataset.test = k).length"
    )
    assert count >= 7
    for number in range(count):
        kind = page.run(f"document.querySelector('[data-test=\"{number}\"]').tagName")
        found = page.run(f"{PLAY}('{number}')")
        assert found["error"] is None
        assert found["moved"] >= 0.2
        assert 1.4 < found["seconds"] < 1.8
        assert found["sound"] > 0
        assert 0.3 < found["peak"] < 1.1
        assert found["shown"] > 100
        if kind == "VIDEO":
            assert found["width"] in (32, 160)
            assert found["frames"] > 2


def test_every_picture_is_there(page):
    sizes = page.run(
        "[...document.images].filter(i => i.hasAttribute('src')).map(i => [i.complete, "
        "i.naturalWidth, i.getBoundingClientRect().width])"
    )
    assert len(sizes) == 5
    assert all(complete and own > 500 and shown > 100 for complete, own, shown in sizes)


def test_a_clip_is_heard_when_clicked_and_by_the_keyboard(page):
    """One at a time."""
    heard = "[...document.querySelectorAll('video')].map(v => !v.muted && !v.paused)"
    assert True not in page.run(heard)
    page.run("document.querySelectorAll('video')[1].click()")
    assert page.run(heard)[:3] == [False, True, False]
    page.run("document.querySelectorAll('video')[0].focus()")
    for kind in ("keyDown", "keyUp"):
        page("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter")
    assert page.run(heard)[:3] == [True, False, False]
    page.run("document.querySelectorAll('video')[0].click()")
    assert True not in page.run(heard)


def test_a_strip_is_enlarged(page):
    page.run("document.querySelectorAll('.strip')[1].click()")
    big, small = (
        "document.querySelector('dialog img')",
        "document.querySelectorAll('.strip img')[1]",
    )
    assert page.run(f"{big}.src === {small}.src && {big}.alt === {small}.alt")
    assert page.run(f"{big}.getBoundingClientRect().width") > 1000
    page.run(f"{big}.click()")
    assert page.run("document.querySelector('dialog').open") is False


def test_details_open(browser, pages):
    browser.open(pages["report"])
    opened = browser.run(
        "[...document.querySelectorAll('details')].map(d => { const before = d.offsetHeight; "
        "d.firstElementChild.click(); return d.open ? d.offsetHeight - before : 0; })"
    )
    assert len(opened) == 5
    assert min(opened) > 15
    assert browser.errors == []


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", ["report", "gallery"])
def test_page_looks_like_one(browser, pages, name, window):
    """Nothing hangs over its side, the ground is light or dark, and there is much to see."""
    width, dark = WINDOWS[window]
    browser.open(pages[name], width=width, dark=dark)
    browser.run("document.fonts.ready.then(() => new Promise(r => setTimeout(r, 300)))")
    assert browser.run("document.documentElement.scrollWidth") == width
    picture = np.asarray(Image.open(BytesIO(browser.screenshot(whole=True))).convert("RGB"))
    assert picture.shape[1] == width
    assert picture.shape[0] > 900
    corner = picture[:10, :10].mean()
    assert corner < 40 if dark else corner > 230
    assert len(np.unique(picture.astype(int) @ (65536, 256, 1))) > 500  # colours
    assert browser.errors == []


def test_charts_are_drawn_in_the_colours_of_the_page(browser, pages):
    browser.open(pages["report"])
    lines = browser.run(
        "[...document.querySelectorAll('svg path, svg circle')].map(p => { const s = "
        "getComputedStyle(p), b = p.getBoundingClientRect(); "
        "return [s.stroke, s.fill, b.width + b.height]; })"
    )
    assert len(lines) > 30
    for stroke, fill, size in lines:
        assert size > 0
        assert "rgb" in stroke + fill
        assert "rgb(0, 0, 0)" not in (stroke, fill)


def test_errors_would_be_seen(browser, tmp_path):
    """What this file looks for can be found."""
    page = tmp_path / "broken.html"
    page.write_text(
        "<!doctype html><img src=absent.png><script>console.error('told'); nothing();</script>"
    )
    browser.open(page)
    told = " ".join(browser.errors)
    assert "told" in told
    assert "nothing is not defined" in told
    assert "FILE_NOT_FOUND" in told
    assert any(url.endswith("absent.png") for url in browser.requests)

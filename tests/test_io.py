import shutil
import subprocess
import sys
import wave
from fractions import Fraction
from functools import cache
from itertools import cycle, product

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import cut_beginning, frame_numbers, make_media, signal, sound_lag
from PIL import Image

from avdiffusion import io

FRAME_RATES = (10, 15, 24, 25, Fraction(30000, 1001), 30, 50, 60)
CONTAINERS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
STARTS = ((0.0, 0.0), (0.2, 0.0), (0.0, 0.32), (2.0, 1.6))
VARIABLE = np.cumsum([0.0] + [0.02, 0.05, 0.033, 0.1, 0.04, 0.02, 0.02, 0.067] * 9)


def check_window(media, start, *, fps=10, frames=10, sample_rate=16000, cut=0.0):
    """A window has the nearest frames and the sound of its own start time, and exactly as much."""
    samples = round(sample_rate * frames / fps)
    window = io.read_window(
        media.path,
        start,
        fps=fps,
        frames=frames,
        sample_rate=sample_rate,
        samples=samples,
        channels=1,
    )
    assert window["video"].dtype == np.uint8
    assert window["video"].shape[:2] == (3, frames)
    assert window["audio"].dtype == np.float32
    assert window["audio"].shape == (1, samples)

    wanted = window["start"] + np.arange(frames) / fps
    times = media.frame_times - cut
    distances = np.abs(times - wanted[:, None])
    assert abs(window["start"] - start) <= 0.5 / fps + 1e-5
    errors = np.abs(times[frame_numbers(window["video"])] - wanted)
    assert errors == pytest.approx(distances.min(1), abs=2e-3)
    if np.diff(times).max() <= 1 / fps + 1e-3:
        assert distances[0].min() < 1.1e-3  # the start is a frame's; Matroska rounds to 1 ms
        assert errors.max() <= 0.5 / fps + 2e-3
    lag = sound_lag(window["audio"][0], window["start"] + cut, sample_rate)
    assert abs(lag) < 2e-3
    expected = signal(window["start"] + cut - lag + np.arange(samples) / sample_rate)
    for edge in (np.s_[:200], np.s_[-200:]):
        assert np.abs(window["audio"][0] - expected)[edge].mean() < 0.12
    return window


@pytest.mark.parametrize("fps", FRAME_RATES, ids=lambda fps: f"{float(fps):.4g}")
def test_windows_of_any_frame_rate(tmp_path, fps):
    media = make_media(tmp_path / "clip.mp4", fps=fps, seconds=2.5)
    assert io.probe(media.path).fps == pytest.approx(float(fps))
    for start in (0.0, 0.517, 1.4):
        check_window(media, start)


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_windows_of_any_container(tmp_path, suffix):
    rate = 48000 if suffix == ".webm" else 22050
    media = make_media(tmp_path / f"clip{suffix}", seconds=3, sample_rate=rate, gop=40)
    info = io.probe(media.path)
    assert (info.height, info.width, info.sample_rate, info.channels) == (48, 96, rate, 1)
    assert info.span(("video", "audio")) == pytest.approx((0, 3), abs=0.025)
    for start in (0.0, 1.03, 1.99):
        check_window(media, start)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".mov"])
def test_variable_frame_rate(tmp_path, suffix):
    media = make_media(
        tmp_path / f"clip{suffix}", frame_times=VARIABLE, seconds=3.2, sample_rate=48000
    )
    for start in (0.0, 0.777, 1.9):
        check_window(media, start, fps=10)
        check_window(media, start, fps=30, frames=24)


@pytest.mark.parametrize("sample_rate", [8000, 11025, 32000, 48000])
@pytest.mark.parametrize("codec", ["aac", "pcm_s16le"])
def test_sample_rates(tmp_path, codec, sample_rate):
    media = make_media(
        tmp_path / "clip.mkv", seconds=2, sample_rate=sample_rate, codecs=("libx264", codec)
    )
    check_window(media, 0.61)
    check_window(media, 0.3, sample_rate=44100)


@pytest.mark.parametrize("channels", [2, 3, 4, 5, 6])
def test_channels(tmp_path, channels):
    media = make_media(tmp_path / "clip.mp4", seconds=2, channels=channels)
    assert io.probe(media.path).channels == channels
    check_window(media, 0.61)


@pytest.mark.parametrize("starts", STARTS[1:])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_streams_that_start_late_and_apart(tmp_path, suffix, starts):
    media = make_media(
        tmp_path / f"clip{suffix}", seconds=2.5, video_start=starts[0], audio_start=starts[1]
    )
    info = io.probe(media.path)
    assert info.video_start == pytest.approx(starts[0], abs=1e-3)
    assert info.audio_start == pytest.approx(starts[1], abs=0.025)  # AAC's first block is early
    check_window(media, max(starts) + 0.06)
    check_window(media, max(starts) + 1.0)


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
@pytest.mark.parametrize("cut", [0.52, 1.0])
def test_edit_lists(tmp_path, suffix, cut):
    media = make_media(tmp_path / f"clip{suffix}", seconds=3)
    cut_beginning(media.path, cut)
    assert io.probe(media.path).span(("video", "audio")) == pytest.approx((0, 3 - cut), abs=0.01)
    check_window(media, 0.0, cut=cut)
    check_window(media, 0.9, cut=cut)


@pytest.mark.parametrize("angle", [90, 180, -90])
def test_rotation(tmp_path, angle):
    media = make_media(tmp_path / "clip.mp4", fps=10, seconds=1, rotation=angle)
    info = io.probe(media.path)
    video = io.read_window(media.path, 0.2, fps=10, frames=4, modalities=["video"])["video"]
    assert video.shape[2:] == (info.height, info.width) == ((96, 48) if angle % 180 else (48, 96))
    assert frame_numbers(np.rot90(video, -angle // 90, (2, 3))) == [2, 3, 4, 5]


def test_flash_and_beep_come_together(tmp_path):
    media = make_media(tmp_path / "clip.mp4", fps=30, seconds=2.5)
    window = check_window(media, 0.5, fps=30, frames=30)
    flash = np.argmax(window["video"][0, :, 36:].mean((1, 2)) > 150) / 30
    high = np.diff(window["audio"][0], 2)  # the beep is far above the chord
    beep = np.argmax(np.abs(high) > 0.1) / 16000
    assert window["start"] + flash == pytest.approx(1, abs=1 / 60)
    assert window["start"] + beep == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("times", [None, VARIABLE], ids=["constant", "variable"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_frames_before_a_window_that_nothing_needs_are_not_decoded(tmp_path, suffix, times):
    """And nothing else is left out or comes out otherwise than when all are decoded."""
    media = make_media(tmp_path / f"clip{suffix}", frame_times=times, seconds=3, gop=200)
    with av.open(str(media.path)) as file:
        everything = [(float(f.time), f.to_ndarray()) for f in file.decode(video=0)]
    first = everything[0][0]
    spared = 0
    for start in first + np.arange(0, 2.8, 0.37):
        with io.opened(media.path) as file:
            stream = io.stream_of(file, "video")
            found = [(time, frame.to_ndarray()) for time, frame in io.decoded(file, stream, start)]
        last = max(time for time, _ in everything if time <= start)
        assert found[0][0] <= last
        needed = [(time, frame) for time, frame in everything if time >= last]
        assert [time for time, _ in found if time >= last] == [time for time, _ in needed]
        for (_, one), (_, other) in zip(found[-len(needed) :], needed, strict=True):
            assert np.array_equal(one, other)
        spared += len(everything) - len(found)
    assert spared > 40


@pytest.mark.slow
def test_everything_with_everything(tmp_path):
    rates = cycle((8000, 11025, 16000, 22050, 32000, 44100, 48000))
    channels = cycle((1, 2, 3, 4, 5, 6))
    for suffix, fps, starts in product(CONTAINERS, FRAME_RATES, STARTS):
        if suffix == ".avi" and any(starts):
            continue  # AVI has no start times
        media = make_media(
            tmp_path / f"clip{suffix}",
            fps=fps,
            seconds=3,
            sample_rate=48000 if suffix == ".webm" else next(rates),
            channels=min(2, next(channels)) if suffix == ".webm" else next(channels),
            video_start=starts[0],
            audio_start=starts[1],
        )
        for start in (0.06, 0.6, 1.45):
            check_window(media, max(starts) + start)
            check_window(media, max(starts) + start, fps=24, frames=20, sample_rate=22050)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")

    @cache
    def made(fps, rate):
        return make_media(folder / f"{fps}_{rate}.mp4", fps=fps, sample_rate=rate, seconds=5)

    return made


@settings(max_examples=20, deadline=None)
@given(
    source_fps=st.sampled_from([7, 12.5, 23.976, 30, 48]),
    source_rate=st.sampled_from([8000, 16000, 44100]),
    fps=st.sampled_from([4, 8, 10, 12.5, 25, 29.97]),
    frames=st.integers(6, 16),
    sample_rate=st.sampled_from([8000, 16000, 22050, 24000]),
    place=st.floats(0, 1),
)
def test_any_window_of_any_file(source, fps, frames, sample_rate, place, source_fps, source_rate):
    media = source(source_fps, source_rate)
    start, end = io.probe(media.path).span(("video", "audio"))
    room = end - start - (frames + 0.5) / fps
    check_window(media, start + place * room, fps=fps, frames=frames, sample_rate=sample_rate)


def test_resampling_keeps_tones_and_times(tmp_path):
    t = np.arange(44100) / 44100
    io.write_wav(tmp_path / "tone.wav", 0.5 * np.sin(2 * np.pi * 3000 * t)[None], sample_rate=44100)
    sound = io.read_window(
        tmp_path / "tone.wav", 0.25, sample_rate=16000, samples=8000, modalities=["audio"]
    )["audio"][0]
    expected = 0.5 * np.sin(2 * np.pi * 3000 * (0.25 + np.arange(8000) / 16000))
    assert np.abs(sound - expected).max() < 1e-3


def test_mono_is_the_mean_and_stereo_the_first_two(tmp_path):
    sound = np.stack([np.linspace(0, 0.5, 4000), np.linspace(0, -0.1, 4000)])
    io.write_wav(tmp_path / "two.wav", sound, sample_rate=8000)
    io.write_wav(tmp_path / "one.wav", sound[:1], sample_rate=8000)

    def read(name, channels):
        return io.read_clip(tmp_path / name, channels=channels)["audio"]

    assert read("two.wav", 1) == pytest.approx(sound.mean(0, keepdims=True), abs=1e-4)
    assert read("two.wav", 2) == pytest.approx(sound, abs=1e-4)
    assert read("two.wav", None) == pytest.approx(sound, abs=1e-4)
    assert read("one.wav", 2) == pytest.approx(sound[[0, 0]], abs=1e-4)


def test_holes_in_the_sound_are_silent(tmp_path):
    whole, holed = tmp_path / "whole.mkv", tmp_path / "holed.mkv"
    make_media(whole, seconds=2, codecs=(None, "pcm_s16le"), sample_rate=16000)
    with av.open(str(whole)) as source, av.open(str(holed), "w") as out:
        stream = out.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.pts is not None and not 0.9 < packet.pts * packet.time_base < 1.1:
                packet.stream = stream
                out.mux(packet)
    read = {"sample_rate": 16000, "samples": 9600, "modalities": ["audio"]}
    expected = io.read_window(whole, 0.7, **read)["audio"][0]
    sound = io.read_window(holed, 0.7, **read)["audio"][0]
    silent = sound == 0
    assert 0.15 < silent[3000:7000].sum() / 16000 < 0.25
    assert sound[~silent] == pytest.approx(expected[~silent], abs=1e-3)


def test_crop_and_letterbox(tmp_path):
    video = np.zeros((3, 2, 64, 128), np.uint8)
    video[0], video[1, :, :, 32:96] = 250, 250  # red, with a yellow square in the middle
    io.write_mp4(tmp_path / "clip.mp4", video, fps=10)

    def first(fit):
        clip = io.read_clip(tmp_path / "clip.mp4", size=(32, 32), fit=fit)["video"]
        assert clip.shape == (3, 2, 32, 32)
        return clip[:, 0].astype(int)

    assert np.abs(first("crop")[:, 2:30, 2:30] - [[[250]], [[250]], [[0]]]).max() < 12
    framed = first("letterbox")
    assert framed[:, :8].max() == framed[:, 24:].max() == 0
    assert framed[0, 8:24].min() > 225
    assert framed[1, 16, 2:6].max() < 15
    assert framed[1, 16, 10:22].min() > 225
    with pytest.raises(ValueError, match="fit is crop or letterbox, not stretch"):
        first("stretch")


def test_shrinking_does_not_alias(tmp_path):
    stripes = np.zeros((3, 1, 128, 128), np.uint8)
    stripes[..., ::2] = 255
    io.write_mp4(tmp_path / "clip.mp4", stripes, fps=10)
    small = io.read_clip(tmp_path / "clip.mp4", size=(32, 32))["video"]
    assert np.abs(small[..., 2:-2].astype(int) - 127).max() < 12


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_written_clips_read_back(tmp_path, suffix):
    blocks = np.random.default_rng(0).integers(90, 170, (3, 12, 4, 4)).astype(np.uint8)
    video = blocks.repeat(16, 2).repeat(16, 3)
    sound = signal(np.arange(19200) / 16000)[None]
    write = io.write_mp4 if suffix == ".mp4" else io.write_webm
    path = write(tmp_path / f"clip{suffix}", video, sound, fps=10, sample_rate=16000)
    clip = io.read_clip(path, sample_rate=16000)
    assert clip["fps"] == 10
    assert clip["video"].shape == video.shape
    centres = np.s_[:, :, 8::16, 8::16]
    error = clip["video"][centres].astype(int) - video[centres]
    assert np.abs(error).max() < 8
    assert np.abs(error.mean((1, 2, 3))).max() < 1
    assert clip["audio"].shape[1] == pytest.approx(19200, abs=320)
    assert abs(sound_lag(clip["audio"][0], clip["start"], 16000)) < 2e-3


@pytest.mark.parametrize(("fps", "sample_rate", "channels"), [(29.97, 22050, 2), (12.5, 6000, 1)])
def test_mp4_plays_everywhere(tmp_path, fps, sample_rate, channels):
    video = np.zeros((3, 25, 32, 48), np.uint8)
    sound = np.zeros((channels, sample_rate * 5))  # longer than the picture
    io.write_mp4(tmp_path / "clip.mp4", video, sound, fps=fps, sample_rate=sample_rate)
    with av.open(str(tmp_path / "clip.mp4")) as file:
        picture, audio = file.streams.video[0], file.streams.audio[0]
        assert picture.codec_context.name == "h264"
        assert picture.codec_context.pix_fmt == "yuv420p"
        assert picture.average_rate == Fraction(str(fps))
        assert audio.codec_context.name == "aac"
        assert audio.codec_context.layout.nb_channels == channels
        assert picture.start_time == audio.start_time == 0
        assert float(picture.duration * picture.time_base) == pytest.approx(25 / fps, abs=1e-3)
        assert float(audio.duration * audio.time_base) == pytest.approx(25 / fps, abs=1e-3)
        assert sum(1 for _ in file.decode(picture)) == 25
    data = (tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert io.mp4_bytes(video, sound, fps=fps, sample_rate=sample_rate) == data


def test_short_sound_is_filled_with_silence(tmp_path):
    video = np.zeros((3, 20, 32, 32), np.uint8)
    io.write_mp4(tmp_path / "clip.mp4", video, np.full((1, 800), 0.1), fps=10, sample_rate=8000)
    assert io.probe(tmp_path / "clip.mp4").audio_end == pytest.approx(2, abs=1e-3)


def test_wav_gif_and_png(tmp_path):
    io.write_wav(tmp_path / "clip.wav", np.array([[0, 0.5, -2], [1, -1, 0]]), sample_rate=8000)
    with wave.open(str(tmp_path / "clip.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (2, 2, 8000)
        samples = np.frombuffer(file.readframes(3), "<i2").reshape(3, 2)
    assert samples.tolist() == [[0, 32767], [16384, -32768], [-32768, 0]]

    video = np.arange(3 * 15 * 8 * 6, dtype=np.uint16).astype(np.uint8).reshape(3, 15, 8, 6)
    io.write_gif(tmp_path / "clip.gif", video, fps=15)
    with Image.open(tmp_path / "clip.gif") as gif:
        assert gif.n_frames == 15
        delays = [gif.seek(k) or gif.info["duration"] for k in range(15)]
    assert sum(delays) == 1000

    io.write_png(tmp_path / "clip.png", video)
    strip = np.asarray(Image.open(tmp_path / "clip.png"))
    assert strip.shape == (8, 15 * 6, 3)
    assert (strip[:, 12:18] == video[:, 2].transpose(1, 2, 0)).all()


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_what_was_read_is_written_as_it_was(tmp_path, channels):
    """Every 16-bit level goes through reading and writing unchanged."""
    levels = np.arange(-32768, 32768, dtype=np.int32).reshape(1, -1).repeat(channels, 0)
    path = io.write_wav(tmp_path / "a.wav", levels / 32768, sample_rate=16000)
    request = {"sample_rate": 16000, "samples": 65536, "modalities": ["audio"]}
    sound = io.read_window(path, 0.0, **request)["audio"]
    assert (sound * 32768 == levels).all()
    again = io.write_wav(tmp_path / "b.wav", sound, sample_rate=16000)
    assert again.read_bytes() == path.read_bytes()


def test_a_window_may_begin_between_frames(tmp_path):
    """Unsnapped, a window is a part of any longer one."""
    path = make_media(tmp_path / "clip.mp4", fps=24, seconds=2).path
    request = {"fps": 10, "modalities": ["video"], "snap": False}
    long = io.read_window(path, 0.02, frames=15, **request)
    for k in (3, 8):
        part = io.read_window(path, 0.02 + k / 10, frames=5, **request)
        assert part["start"] == 0.02 + k / 10
        assert (part["video"] == long["video"][:, k : k + 5]).all()
    snapped = io.read_window(path, 0.32, fps=10, frames=5, modalities=["video"])
    assert snapped["start"] == pytest.approx(8 / 24)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    video, path = np.zeros((3, 4, 32, 32), np.uint8), tmp_path / "clip.mp4"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        io.write_mp4(path, video, fps=10)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("video", "audio", "message"),
    [
        (np.zeros((3, 4, 31, 32), np.uint8), None, "height and width must be even.*31x32"),
        (np.zeros((3, 4, 32, 32), np.float32), None, "video must be uint8 .*float32"),
        (np.zeros((4, 3, 32, 32), np.uint8), None, "video must be uint8 "),
        (np.zeros((3, 4, 32, 32), np.uint8), np.zeros((5, 9)), r"audio must be float .*\(5, 9\)"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, video, audio, message):
    with pytest.raises(ValueError, match=message):
        io.write_mp4(tmp_path / "clip.mp4", video, audio, fps=10, sample_rate=8000)
    assert not list(tmp_path.iterdir())


def test_windows_outside_the_file_are_refused(tmp_path):
    media = make_media(tmp_path / "clip.mp4", seconds=2, audio_start=0.5, audio_seconds=1)
    both = {"fps": 10, "frames": 8, "sample_rate": 16000, "samples": 12800}
    for start, message in [(1.5, "picture ends at 2.00 s"), (0.0, "sound lasts from 0.[45]")]:
        with pytest.raises(io.MediaError, match=f"clip.mp4: {message}"):
            io.read_window(media.path, start, **both)
    late = make_media(tmp_path / "late.mp4", seconds=2, video_start=1.0)
    with pytest.raises(io.MediaError, match=r"picture begins at 1\.00 s"):
        io.read_window(late.path, 0.2, **both)


def test_files_that_are_no_media(tmp_path):
    (tmp_path / "text.mp4").write_text("no film\n" * 50)
    (tmp_path / "empty.mp4").touch()
    for name in ("text.mp4", "empty.mp4"):
        with pytest.raises(io.MediaError, match=f"{name}: unreadable"):
            io.probe(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
        io.probe(tmp_path / "none.mp4")


@pytest.mark.parametrize(
    ("suffix", "reason"), [(".mp4", "truncated: 4.00 s"), (".mkv", "truncated"), (".mov", "unread")]
)
def test_truncated_files_are_found_out(tmp_path, suffix, reason):
    path = make_media(tmp_path / f"clip{suffix}", seconds=4).path
    if suffix == ".mp4":  # with its index in front, as most on the web
        video = np.random.default_rng(0).integers(0, 255, (3, 40, 32, 32)).astype(np.uint8)
        io.write_mp4(path, video, np.zeros((1, 64000)), fps=10, sample_rate=16000)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(io.MediaError, match=f"clip{suffix}: {reason}"):
        io.probe(path)


def test_what_a_truncated_avi_still_holds_is_used(tmp_path):
    path = make_media(tmp_path / "clip.avi", seconds=4).path
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert 1 < io.probe(path).span(("video", "audio"))[1] < 2.2


def test_import_needs_no_media_library():
    code = "import sys; sys.modules['av'] = sys.modules['PIL'] = None; import avdiffusion.io"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_any_file_name(tmp_path):
    path = tmp_path / "a =~[b] ü .mp4"
    shutil.move(make_media(tmp_path / "clip.mp4", seconds=1).path, path)
    assert io.probe(path).fps == 25
    assert io.audible(path)

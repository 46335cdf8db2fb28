"""Clips rewritten picture by picture: every frame, its time and the sound are what they were."""

import gc
import weakref
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import cut_beginning, frame_numbers, keep_parts, make_media, signal

from avdiffusion import io
from avdiffusion.stream import place, rewrite

VARIABLE = np.cumsum([0.0] + [0.02, 0.05, 0.033, 0.1, 0.04, 0.02, 0.02, 0.067] * 4)
NTSC = Fraction(30000, 1001)
SHARED = Path(__file__).parents[2] / "shared" / "data"


def as_it_is(video):
    return video


def twice(video):
    return video.repeat(2, 2).repeat(2, 3)


def pictures(path):
    """(time, pixels as stored) of every picture of the stream that players choose."""
    with av.open(str(path)) as file:
        stream = file.streams.best("video")
        shown = [
            (f, f.reformat(format="rgb24", interpolation=io.exact_bicubic()))
            for f in file.decode(stream)
        ]
        return [(frame.pts * stream.time_base, rgb.to_ndarray()) for frame, rgb in shown]


def sounds(path):
    """Of every track the packets, and times and samples of the decoded blocks."""
    tracks = []
    with av.open(str(path)) as file:
        count = len(file.streams.audio)
    for track in range(count):
        with av.open(str(path)) as file:
            packets = b"".join(bytes(p) for p in file.demux(file.streams.audio[track]))
        with av.open(str(path)) as file:
            blocks = [(b.pts * b.time_base, b.to_ndarray()) for b in file.decode(audio=track)]
        tracks.append((packets, [t for t, _ in blocks], np.concatenate([b for _, b in blocks], 1)))
    return tracks


def check_kept(source, path, zero=0, ticks=Fraction(1, 90000)):
    """Times of pictures are equal but for `zero`, where the source's clock begins; sound is too.

    `ticks`: the larger of the clocks on which the times of sound are said.
    """
    before, after = pictures(source), pictures(path)
    assert [time for time, _ in after] == [time - zero for time, _ in before]
    assert len(sounds(path)) == len(sounds(source))
    for (now, times, samples), (then, old_times, old) in zip(
        sounds(path), sounds(source), strict=True
    ):
        assert now == then
        assert samples.dtype == old.dtype
        assert samples.shape == old.shape
        assert (samples == old).all()
        late = [abs(t - (o - zero)) for t, o in zip(times, old_times, strict=True)]
        assert max(late) <= ticks
    return before, after


CASES = {
    "mp4": (".mp4", {}, ".mp4"),
    "variable": (".mp4", {"frame_times": VARIABLE}, ".mp4"),
    "late": (".mp4", {"video_start": 0.2, "audio_start": 0.3217}, ".mp4"),
    "both late": (".mov", {"video_start": 2.0, "audio_start": 1.6013, "fps": NTSC}, ".mov"),
    "one frame": (".mp4", {"seconds": 0.04}, ".mp4"),
    "silent": (".mp4", {"codecs": ("libx264", None)}, ".mp4"),
    "odd": (".webm", {"codecs": ("libvpx-vp9", None), "size": (47, 95)}, ".mp4"),
    "ten bits": (".mp4", {"pix_fmt": "yuv420p10le"}, ".mp4"),
    "many channels": (".mp4", {"channels": 6}, ".mp4"),
    "PCM": (".mov", {"fps": NTSC}, ".mov"),
    "bytes": (".avi", {"codecs": ("mpeg4", "pcm_u8")}, ".mov"),
    "mp3": (".avi", {"codecs": ("mpeg4", "libmp3lame")}, ".mp4"),
    "mkv": (".mkv", {"frame_times": VARIABLE, "sample_rate": 48000}, ".mkv"),
    "mkv PCM": (".mkv", {"codecs": ("libx264", "pcm_s24le")}, ".mkv"),
    "webm": (".webm", {"sample_rate": 48000, "video_start": 0.4, "audio_start": 0.3}, ".mkv"),
}


@pytest.mark.parametrize("case", CASES)
def test_pictures_keep_their_times_and_sound_stays_bit_for_bit(tmp_path, case):
    suffix, options, expected = CASES[case]
    source = make_media(tmp_path / f"clip{suffix}", **({"seconds": 1.3} | options)).path
    path = rewrite(source, tmp_path / "out" / "clip.any", as_it_is, frames=7)
    assert path == tmp_path / "out" / f"clip{expected}" == place(source, tmp_path / "out" / "clip")
    before, after = check_kept(source, path)
    shown = np.stack([pixels for _, pixels in after], 1).transpose(3, 1, 0, 2)
    assert frame_numbers(shown) == list(range(len(before)))
    height, width = before[0][1].shape[:2]
    differences = [
        np.abs(now[:height, :width].astype(int) - then).mean()
        for (_, now), (_, then) in zip(after, before, strict=True)
    ]
    assert max(differences) < 2
    if suffix == ".mp4" and case != "one frame":
        with av.open(str(source)) as file:
            assert any(p.pts != p.dts for p in file.demux(video=0) if p.size)  # out of order


@pytest.mark.parametrize("suffix", [".ts", ".mpg"])
def test_a_broadcasts_clock_begins_anew(tmp_path, suffix):
    source = make_media(tmp_path / f"clip{suffix}", seconds=1.3, video_start=3, audio_start=2.9)
    with av.open(str(source.path)) as file:
        first = [Fraction(stream.start_time) * stream.time_base for stream in file.streams]
    path = rewrite(source.path, tmp_path / "out", as_it_is)
    (_, times, samples), (_, old_times, old) = sounds(path)[0], sounds(source.path)[0]
    assert min(first) > 0
    assert [time for time, _ in pictures(path)] == [
        time - min(first) for time, _ in pictures(source.path)
    ]
    assert samples.shape == old.shape
    assert (samples == old).all()
    assert times[0] == pytest.approx(float(old_times[0] - min(first)), abs=1e-4)


@pytest.mark.parametrize("cut", [0.52, 0.5037])
def test_what_an_edit_list_hides_stays_hidden(tmp_path, cut):
    source = make_media(tmp_path / "clip.mp4", seconds=2).path
    cut_beginning(source, cut)
    path = rewrite(source, tmp_path / "out", as_it_is)
    before, _ = check_kept(source, path)
    assert len(before) == 37


def test_what_is_hidden_between_is_refused_if_it_is_sound(tmp_path):
    for codec in (None, "aac"):
        source = make_media(tmp_path / f"{codec}.mp4", seconds=3, codecs=("libx264", codec)).path
        keep_parts(source, [(0, 1), (2, 1)])
    path = rewrite(tmp_path / "None.mp4", tmp_path / "out", as_it_is)
    shown = np.stack([pixels for _, pixels in check_kept(tmp_path / "None.mp4", path)[1]], 1)
    assert frame_numbers(shown.transpose(3, 1, 0, 2)) == [*range(25), *range(50, 75)]
    with pytest.raises(io.MediaError, match=r"aac\.mp4: an edit list hides sound.*clip anew"):
        rewrite(source, tmp_path / "other", as_it_is)


def test_every_track_is_copied_wherever_the_picture_stands(tmp_path):
    options = {"seconds": 1, "sample_rate": 8000, "audio_start": 0.25}
    first = make_media(tmp_path / "a.mp4", codecs=(None, "aac"), **options).path
    other = make_media(tmp_path / "b.mp4", seconds=1).path
    with (
        av.open(str(first)) as a,
        av.open(str(other)) as b,
        av.open(str(tmp_path / "both.mp4"), "w") as out,
    ):
        out.metadata["title"] = "two"
        copies = {s: out.add_stream_from_template(s) for file in (a, b) for s in file.streams}
        copies[a.streams[0]].metadata["language"] = "fra"
        for packet in [*a.demux(), *b.demux()]:
            if packet.size:
                packet.stream = copies[packet.stream]
                out.mux(packet)
    path = rewrite(tmp_path / "both.mp4", tmp_path / "out", as_it_is)
    before, _ = check_kept(tmp_path / "both.mp4", path)
    assert len(before) == 25
    with av.open(str(path)) as file:
        assert [s.sample_rate for s in file.streams.audio] == [8000, 44100]
        assert file.streams.audio[0].metadata["language"] == "fra"
        assert file.metadata["title"] == "two"


# ------------------------------------------------------------------------------------ pictures


def painted(path, *, aspect=None, size=(48, 64), codec="mpeg4", **tags):
    """Ten pictures of one ramp of colours from top to bottom, 10 a second."""
    ramp = np.linspace(20, 235, size[0]).astype(np.uint8)
    ramp = np.stack([ramp, ramp[::-1], ramp // 2 + 40], 1)[:, None].repeat(size[1], 1)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=10, options={"qmin": "1", "qmax": "1"})
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for k in range(10):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(ramp), format="rgb24")
            frame.pts = k
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("codec", ["mpeg4", "mjpeg"])
def test_colours_are_what_they_were_and_tagged(tmp_path, codec):
    source = painted(tmp_path / "clip.avi", codec=codec)
    path = rewrite(source, tmp_path / "out", twice)
    before = np.stack([pixels for _, pixels in pictures(source)]).astype(int)
    after = np.stack([pixels for _, pixels in pictures(path)])
    assert after.shape == (10, 96, 128, 3)
    error = after - before.repeat(2, 1).repeat(2, 2)
    assert np.abs(error).mean() < 2
    assert np.abs(error.mean((0, 1, 2))).max() < 0.5  # no colour is shifted
    with av.open(str(path)) as file:
        context = file.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        tags = "colorspace", "color_range", "color_primaries", "color_trc"
        assert [getattr(context, tag) for tag in tags] == [1, 1, 1, 1]
        assert file.streams.video[0].average_rate == 10
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_wide_gamuts_stay_named(tmp_path):
    tags = {"color_primaries": 9, "color_trc": 18}  # BT.2020 and HLG, as phones record
    source = painted(tmp_path / "clip.mp4", codec="libx264", colorspace=9, **tags)
    path = rewrite(source, tmp_path / "out", as_it_is)
    with av.open(str(path)) as file:
        context = file.streams.video[0].codec_context
        assert (context.color_primaries, context.color_trc, context.colorspace) == (9, 18, 1)
    for (_, now), (_, then) in zip(pictures(path), pictures(source), strict=True):
        assert np.abs(now.astype(int) - then).mean() < 2


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_pictures_are_shown_upright_in_their_shape(tmp_path, rotation):
    source = make_media(tmp_path / "clip.mov", seconds=0.4, rotation=rotation).path
    seen = []
    path = rewrite(source, tmp_path / "out", lambda video: seen.append(video) or video)
    upright = np.concatenate(seen, 1)
    wanted = io.read_clip(source, modalities=["video"])["video"]
    assert upright.shape == wanted.shape
    assert (upright == wanted).all()
    shown = io.read_clip(path, modalities=["video"])["video"]
    assert np.abs(shown.astype(int) - wanted).mean() < 2
    assert np.stack([pixels for _, pixels in pictures(path)], 1).shape[:3] == (
        wanted.shape[2],
        wanted.shape[1],
        wanted.shape[3],
    )


def test_pixels_that_are_not_square_stay_so(tmp_path):
    source = painted(tmp_path / "clip.mkv", aspect=Fraction(3, 2))
    path = rewrite(source, tmp_path / "out", twice)
    assert pictures(path)[0][1].shape == (96, 128, 3)
    assert (io.probe(path).height, io.probe(path).width) == (96, 192)


def test_an_odd_size_repeats_its_edges(tmp_path):
    source = painted(tmp_path / "clip.avi")
    path = rewrite(source, tmp_path / "out", lambda video: video[:, :, :47, :63])
    before, after = pictures(source)[0][1].astype(int), pictures(path)[0][1].astype(int)
    assert after.shape == (48, 64, 3)
    assert np.abs(after[:47, :63] - before[:47, :63]).mean() < 2
    assert np.abs(after[47] - after[46]).mean() < 2
    assert np.abs(after[:, 63] - after[:, 62]).mean() < 2


# ------------------------------------------------------------------------------- parts, memory


@settings(max_examples=12, deadline=None)
@given(frames=st.integers(1, 30), count=st.integers(1, 26))
def test_parts_follow_one_another(tmp_path_factory, frames, count):
    folder = tmp_path_factory.mktemp("parts")
    source = make_media(folder / "clip.mp4", seconds=count / 25).path
    numbers, done = [], []

    def change(video):
        assert video.dtype == np.uint8
        assert video.shape[2:] == (48, 96)
        numbers.append(frame_numbers(video))
        return video

    path = rewrite(source, folder / "out", change, frames=frames, progress=done.append)
    assert list(chain(*numbers)) == list(range(count))
    assert [len(part) for part in numbers] == done
    assert set(done[:-1]) <= {frames}
    assert 1 <= done[-1] <= frames
    assert len(pictures(path)) == count


def test_what_is_held_does_not_grow_with_length(tmp_path):
    """Of what `change` was given and gave, at most four parts are there at any time."""
    most = {}
    for count in (100, 1000):
        source = io.write_mp4(
            tmp_path / f"{count}.mp4",
            np.zeros((3, count, 16, 16), np.uint8),
            signal(np.arange(count * 80) / 8000)[None],
            fps=100,
            sample_rate=8000,
        )
        alive, most[count] = weakref.WeakValueDictionary(), 0

        def change(video, alive=alive, count=count):
            made = video.copy()
            for array in (video, made):
                alive[id(array)] = array
            most[count] = max(most[count], len(alive))
            return made

        rewrite(source, tmp_path / "out", change, frames=10)
        gc.collect()
    assert max(most.values()) <= 8  # how many of them is a matter of time


# ----------------------------------------------------------------------------------- what fails


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_clip_broken_in_the_middle_leaves_nothing(tmp_path):
    source = make_media(tmp_path / "clip.mp4", seconds=3).path
    data = bytearray(source.read_bytes())
    begin, end = int(0.4 * len(data)), int(0.5 * len(data))
    data[begin:end] = bytes(end - begin)
    source.write_bytes(data)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "clip.mp4").write_bytes(b"old")
    seen = []
    with pytest.raises(io.MediaError, match=r"clip\.mp4: unreadable"):
        rewrite(source, tmp_path / "out" / "clip.mp4", lambda v: seen.append(v) or v, frames=4)
    assert seen  # the fault was met on the way
    assert left(tmp_path / "out") == ["clip.mp4"]
    assert (tmp_path / "out" / "clip.mp4").read_bytes() == b"old"


def test_a_truncated_clip_is_refused(tmp_path):
    source = rewrite(make_media(tmp_path / "a.mp4").path, tmp_path / "clip.mp4", as_it_is)
    source.write_bytes(source.read_bytes()[: source.stat().st_size * 6 // 10])
    with pytest.raises(io.MediaError, match=r"clip\.mp4: truncated: 3\.00 s promised"):
        rewrite(source, tmp_path / "out", as_it_is)
    assert left(tmp_path) == ["a.mp4", "clip.mp4"]


def test_pictures_at_one_time_are_refused(tmp_path):
    whole = painted(tmp_path / "a.mkv", codec="mjpeg")
    with av.open(str(whole)) as file, av.open(str(tmp_path / "clip.mkv"), "w") as out:
        stream = out.add_stream_from_template(file.streams.video[0])
        for packet in file.demux(video=0):
            if packet.size:
                packet.stream = stream
                packet.pts = packet.dts = min(packet.pts, 500)
                out.mux(packet)
    with pytest.raises(io.MediaError, match=r"clip\.mkv: pictures without times of their own"):
        rewrite(tmp_path / "clip.mkv", tmp_path / "out", as_it_is)
    assert left(tmp_path) == ["a.mkv", "clip.mkv"]


def test_what_change_raises_is_raised_and_leaves_nothing(tmp_path):
    source = make_media(tmp_path / "clip.mp4", seconds=1).path

    def fail(video):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        rewrite(source, tmp_path / "out", fail)
    with pytest.raises(ValueError, match="zip"):  # a part with fewer pictures than it had
        rewrite(source, tmp_path / "out", lambda video: video[:, 1:])
    assert left(tmp_path) == ["clip.mp4"]


def test_what_has_no_picture_is_refused(tmp_path):
    wave = io.write_wav(tmp_path / "a.wav", np.zeros((1, 800)), sample_rate=8000)
    with pytest.raises(io.MediaError, match=r"a\.wav: no picture"):
        rewrite(wave, tmp_path / "out", as_it_is)
    with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
        rewrite(tmp_path / "none.mp4", tmp_path / "out", as_it_is)
    assert left(tmp_path) == ["a.wav"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
@pytest.mark.parametrize(
    "name",
    [
        "pouring/test/VID_20240211_193436_2.0_6.3.mp4",
        "clips/LipNet__GRID_bbaf2n.mpg",  # MPEG-1 and MP2
    ],
)
@pytest.mark.slow
def test_real_clips(tmp_path, name):
    source = SHARED / name
    path = rewrite(source, tmp_path / "out" / source.name, as_it_is)
    before, after = check_kept(source, path)
    assert after[0][1].shape == before[0][1].shape

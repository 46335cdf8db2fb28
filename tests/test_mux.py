"""Clips that keep the picture or the sound of another file."""

from fractions import Fraction

import av
import numpy as np
import pytest
from media_files import cut_beginning, frame_numbers, make_media, signal, sound_lag

from avdiffusion import io
from avdiffusion.mux import write_with

VARIABLE = np.cumsum([0.0] + [0.02, 0.05, 0.033, 0.1, 0.04, 0.02, 0.02, 0.067] * 6)
HISS = np.random.default_rng(0).uniform(-0.3, 0.3, (1, 80000)).astype(np.float32)
FLICKER = np.random.default_rng(0).integers(0, 255, (3, 60, 16, 16)).astype(np.uint8)


def packets(path, kind):
    with av.open(str(path)) as file:
        stream = file.streams.best(kind)
        return [bytes(packet) for packet in file.demux(stream) if packet.size]


def frames(path):
    """(time, pixels) of every picture."""
    with av.open(str(path)) as file:
        return [(float(f.time), f.to_ndarray(format="rgb24")) for f in file.decode(video=0)]


def with_hiss(folder, source, start, seconds):
    """The source's picture with other sound, its file and how it came there."""
    path = folder / "out.mp4"
    how = write_with(
        path, source, "video", start=start, seconds=seconds, audio=HISS, sample_rate=8000
    )
    return path, how


def with_flicker(folder, source, start, seconds):
    """The source's sound with another picture, likewise."""
    path, count = folder / "out.mp4", round(seconds * 10)
    how = write_with(
        path, source, "audio", start=start, seconds=seconds, video=FLICKER[:, :count], fps=10
    )
    assert len(frames(path)) == count
    return path, how


def check_lengths(path, seconds, slack=1e-3):
    """Picture and sound begin at 0 and last as long; the index lies in front."""
    info = io.probe(path)
    assert info.video_start == info.audio_start == 0
    assert info.video_end == pytest.approx(seconds, abs=slack)
    assert info.audio_end == pytest.approx(seconds, abs=1e-3)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    return info


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        (".mp4", {}),
        (".mov", {"rotation": 90}),
        (".mkv", {"frame_times": VARIABLE, "sample_rate": 48000}),
        (".ts", {}),
        (".webm", {"codecs": ("libvpx-vp9", None), "size": (47, 95)}),
        (".mp4", {"video_start": 0.2, "audio_start": 0.32}),
    ],
    ids=["mp4", "rotated", "variable", "ts", "odd vp9", "late"],
)
def test_a_whole_picture_is_copied(tmp_path, suffix, options):
    source = make_media(tmp_path / f"clip{suffix}", seconds=2, **options).path
    before = io.probe(source)
    seconds = before.video_end - before.video_start
    path, how = with_hiss(tmp_path, source, before.video_start, seconds)
    assert how == "copied"
    if suffix != ".ts":  # MP4 says the lengths of units where a transport stream has start codes
        assert packets(path, "video") == packets(source, "video")
    for (now, pixels), (then, kept) in zip(frames(path), frames(source), strict=True):
        assert now == pytest.approx(then - before.video_start, abs=1e-4)
        assert (pixels == kept).all()
    info = io.probe(path)
    assert (info.height, info.width) == (before.height, before.width)
    assert info.audio_end == pytest.approx(seconds, abs=1e-3)
    heard = io.read_clip(path, sample_rate=8000, modalities=["audio"])["audio"]
    assert np.corrcoef(heard[0, 2000:15000], HISS[0, 2000:15000])[0, 1] > 0.9


def test_a_picture_is_cut_where_no_frame_is_missed(tmp_path):
    """Copied if it can be, else encoded: in both cases all frames, and no more, at their times."""
    source = make_media(tmp_path / "clip.mp4", seconds=3).path
    found = {}
    for count in range(30, 42):
        path, how = with_hiss(tmp_path, source, 0.0, count / 25)
        found[how] = found.get(how, 0) + 1
        check_lengths(path, count / 25)
        times = [time for time, _ in frames(path)]
        assert times == pytest.approx(np.arange(count) / 25, abs=1e-4)
        shown = io.read_window(path, 0, fps=25, frames=count, modalities=["video"])["video"]
        assert frame_numbers(shown) == list(range(count))
        if how == "copied":
            assert packets(path, "video") == packets(source, "video")[:count]
    assert found.keys() == {"copied", "encoded"}


@pytest.mark.parametrize("cut", [0.52, 1.0])
def test_what_an_edit_list_hides_stays_hidden(tmp_path, cut):
    source = make_media(tmp_path / "clip.mp4", seconds=3).path
    cut_beginning(source, cut)
    kept = frames(source)
    path, how = with_hiss(tmp_path, source, 0.0, 3 - cut)
    assert how == "copied"
    assert [time for time, _ in frames(path)] == pytest.approx([time for time, _ in kept], abs=1e-3)
    assert all((a == b).all() for (_, a), (_, b) in zip(frames(path), kept, strict=True))


@pytest.mark.parametrize(
    ("suffix", "start", "options"),
    [
        (".mp4", 0.5, {}),
        (".mp4", 0.5, {"rotation": -90}),
        (".mkv", 0.777, {"frame_times": VARIABLE, "sample_rate": 48000}),
        (".avi", 0.5, {"codecs": ("mpeg4", None)}),
        (".mpg", None, {}),
        (".webm", 0.4, {"codecs": ("libvpx-vp9", None), "size": (47, 95)}),
        (".mkv", None, {"fps": Fraction(30000, 1001), "codecs": ("ffv1", None)}),
    ],
    ids=["mp4", "rotated", "variable", "mpeg4", "mpeg", "odd vp9", "ffv1"],
)
def test_other_pictures_are_encoded_at_their_times(tmp_path, suffix, start, options):
    source = make_media(tmp_path / f"clip{suffix}", seconds=2.1, **options).path
    before = io.probe(source)
    start = before.video_start if start is None else start
    path, how = with_hiss(tmp_path, source, start, 1.2)
    assert how == "encoded"
    info = check_lengths(path, 1.2)
    size = info.height, info.width
    assert size == (before.height + before.height % 2, before.width + before.width % 2)
    request = {"fps": 97, "frames": 114, "modalities": ["video"], "snap": False}
    shown = io.read_window(path, 0.0, **request)["video"]
    wanted = io.read_window(source, start, **request)["video"]
    turned = options.get("rotation", 0) // 90
    numbers = frame_numbers(np.rot90(shown, -turned, (2, 3)))
    differing = np.array(numbers) != frame_numbers(np.rot90(wanted, -turned, (2, 3)))
    assert differing.mean() < 0.04  # of two frames as near
    height, width = wanted.shape[2:]
    error = shown[..., :height, :width].astype(int) - wanted
    assert np.abs(error[:, ~differing]).mean() < 1.5
    assert np.abs(error[:, ~differing].mean((1, 2, 3))).max() < 1  # no colour is shifted


def test_full_range_becomes_what_players_expect(tmp_path):
    with av.open(str(tmp_path / "clip.avi"), "w") as out:
        stream = out.add_stream("mjpeg", rate=10, options={"qmin": "1", "qmax": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuvj420p"
        for k in range(20):
            ramp = (
                np.linspace(0, 255, 64).astype(np.uint8)[None, :, None].repeat(32, 0).repeat(3, 2)
            )
            frame = av.VideoFrame.from_ndarray(ramp, format="rgb24")
            frame.pts = k
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    path, how = with_hiss(tmp_path, tmp_path / "clip.avi", 0.0, 2.0)
    assert how == "encoded"
    before, after = (io.read_clip(p, modalities=["video"])["video"] for p in (out.name, path))
    assert np.abs(after.astype(int) - before).mean() < 2
    with av.open(str(path)) as file:
        assert file.streams.video[0].codec_context.pix_fmt == "yuv420p"
        assert file.streams.video[0].codec_context.color_range == 1


def test_pixels_that_are_not_square_stay_so(tmp_path):
    with av.open(str(tmp_path / "clip.mkv"), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(3, 2)
        for k in range(20):
            frame = av.VideoFrame.from_ndarray(
                np.full((48, 64, 3), 9 * k, np.uint8), format="rgb24"
            )
            frame.pts = k
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    assert (io.probe(out.name).height, io.probe(out.name).width) == (48, 96)
    path, how = with_hiss(tmp_path, out.name, 0.0, 1.6)
    assert how == "encoded"
    assert (io.probe(path).height, io.probe(path).width) == (48, 96)


@pytest.mark.parametrize(
    ("suffix", "codec", "rate"),
    [
        (".mp4", "aac", 44100),
        (".mkv", "aac", 22050),
        (".mp3", "libmp3lame", 44100),
        (".ogg", "libopus", 48000),
        (".flac", "flac", 32000),
    ],
)
@pytest.mark.parametrize("seconds", [3.0, 1.6])
def test_sound_is_copied(tmp_path, suffix, codec, rate, seconds):
    source = make_media(
        tmp_path / f"clip{suffix}", seconds=3, sample_rate=rate, codecs=(None, codec), channels=2
    ).path
    start = io.probe(source).audio_start
    path, how = with_flicker(tmp_path, source, start, seconds)
    assert how == "copied"
    info = check_lengths(path, seconds)
    assert (info.sample_rate, info.channels) == (rate, 2)
    copied, whole = packets(path, "audio"), packets(source, "audio")
    assert copied == whole[: len(copied)]
    assert len(copied) == len(whole) or seconds == 1.6
    request = {"sample_rate": rate, "samples": round(rate * (seconds - 0.1))}
    sounds = [
        io.read_window(p, at, modalities=["audio"], **request)["audio"]
        for p, at in ((path, 0.0), (source, start))
    ]
    assert np.abs(sounds[0] - sounds[1]).max() < 1e-4


@pytest.mark.parametrize(
    ("suffix", "codec", "channels", "start"),
    [
        (".wav", "pcm_s16le", 1, 0.0),
        (".wav", "pcm_s16le", 2, 0.0),
        (".mkv", "pcm_s16le", 6, 0.0),
        (".mp4", "aac", 6, 0.5),
        (".mpg", "mp2", 2, None),
    ],
)
def test_other_sound_is_encoded_at_its_rate(tmp_path, suffix, codec, channels, start):
    source = make_media(
        tmp_path / f"clip{suffix}", seconds=2.5, codecs=(None, codec), channels=channels
    ).path
    start = io.probe(source).audio_start if start is None else start
    path, how = with_flicker(tmp_path, source, start, 1.6)
    assert how == "encoded"
    info = check_lengths(path, 1.6)
    assert (info.audio_codec, info.sample_rate, info.channels) == ("aac", 44100, channels)
    sound = io.read_window(path, 0, sample_rate=44100, samples=70000, modalities=["audio"])["audio"]
    origin = start if suffix != ".mpg" else 0.0  # where the muxer puts its first block
    for channel in sound[[0, 1] if channels == 2 else [0]]:
        lag = sound_lag(channel, origin, 44100)
        assert abs(lag) < (2e-3 if suffix != ".mpg" else 0.05)
        wanted = signal(origin - lag + np.arange(70000) / 44100)
        assert np.abs(channel - wanted)[3000:].mean() < 0.02


def test_long_clips_lie_interleaved(tmp_path):
    """A player that reads on need not seek for the sound."""
    video = np.zeros((3, 250, 16, 16), np.uint8)
    io.write_mp4(tmp_path / "a.mp4", video, np.zeros((1, 200000)), fps=10, sample_rate=8000)
    wave = io.write_wav(tmp_path / "a.wav", HISS.repeat(3, 1)[:, :200000], sample_rate=8000)
    write_with(tmp_path / "b.mp4", wave, "audio", start=0, seconds=25, video=video, fps=10)
    for name in ("a.mp4", "b.mp4"):
        with av.open(str(tmp_path / name)) as file:
            spots = [(p.pos, p.pts * p.time_base, p.stream.type) for p in file.demux() if p.size]
        spots.sort()
        latest = {"video": 0, "audio": 0}
        for _, time, kind in spots:
            latest[kind] = float(time)
            assert abs(latest["video"] - latest["audio"]) < 1.5


def test_what_is_not_there_cannot_be_kept(tmp_path):
    wave = io.write_wav(tmp_path / "a.wav", HISS, sample_rate=8000)
    clip = io.write_mp4(tmp_path / "b.mp4", FLICKER, fps=10)
    with pytest.raises(io.MediaError, match=r"a\.wav: no picture"):
        with_hiss(tmp_path, wave, 0.0, 1.6)
    with pytest.raises(io.MediaError, match=r"b\.mp4: no sound"):
        with_flicker(tmp_path, clip, 0.0, 1.6)
    with pytest.raises(FileNotFoundError, match=r"c\.mp4"):
        with_hiss(tmp_path, tmp_path / "c.mp4", 0.0, 1.6)
    assert {p.name for p in tmp_path.iterdir()} == {"a.wav", "b.mp4"}

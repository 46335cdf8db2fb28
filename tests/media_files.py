"""Media files whose every frame and sample says when it is shown or heard.

Each frame carries its number as black and white squares; the sound is a fixed function of time, the
same in all channels. Once a second, on the second, the lower half flashes and a beep sounds.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

BITS = 12
HEIGHT, WIDTH = 48, 96
BEEP = 0.05

CODECS = {
    ".mp4": ("libx264", "aac"),
    ".mov": ("libx264", "pcm_s16le"),
    ".mkv": ("libx264", "aac"),
    ".webm": ("libvpx", "libopus"),
    ".avi": ("mpeg4", "pcm_s16le"),
    ".mpg": ("mpeg2video", "mp2"),
    ".ts": ("libx264", "aac"),
}
OPTIONS = {
    "libx264": {"preset": "veryfast", "crf": "18"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8", "crf": "10", "b": "1M"},
}
LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1"}


@dataclass(frozen=True)
class MediaFile:
    path: Path
    frame_times: np.ndarray


def make_media(
    path: Path,
    *,
    fps: float | Fraction = 25,
    frame_times: np.ndarray | None = None,
    seconds: float = 3.0,
    sample_rate: int | None = 44100,
    channels: int = 1,
    video_start: float = 0.0,
    audio_start: float = 0.0,
    audio_seconds: float | None = None,
    rotation: int = 0,
    gop: int = 12,
    codecs: tuple[str | None, str | None] | None = None,
    silent: bool = False,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    pix_fmt: str = "yuv420p",
) -> MediaFile:
    """A file of `seconds` from each start; `frame_times` in seconds makes its frame rate variable.

    `codecs` (None for a missing stream) defaults to what suits the suffix.
    """
    video_codec, audio_codec = codecs or CODECS[path.suffix]
    rate = Fraction(fps).limit_denominator(1001)
    if frame_times is None:
        ticks = np.arange(round(seconds * rate)) + round(video_start * rate)
        clock = 1 / rate
    else:
        ticks = np.round((np.asarray(frame_times) + video_start) * 1000).astype(int)
        clock = Fraction(1, 1000)
    times = ticks * float(clock)
    with av.open(str(path), "w") as out:
        if video_codec:
            picture = out.add_stream(video_codec, rate=rate, options=OPTIONS.get(video_codec, {}))
            picture.height, picture.width = size
            picture.pix_fmt = pix_fmt
            picture.gop_size = gop
            picture.bit_rate = 2_000_000
            picture.codec_context.thread_count = 1
            picture.codec_context.time_base = clock
            if rotation:
                picture.set_display_rotation(rotation)
        if audio_codec:
            sound = out.add_stream(audio_codec, rate=sample_rate, layout=LAYOUTS[channels])
            sound.codec_context.time_base = Fraction(1, sample_rate)
        if video_codec:
            reformat = VideoReformatter().reformat
            for number, (tick, time) in enumerate(zip(ticks, times, strict=True)):
                pixels = _draw(number, time, size)
                grey = av.VideoFrame.from_ndarray(pixels, format="gray")
                frame = reformat(grey, format=pix_fmt, threads=1)
                frame.pts, frame.time_base = int(tick), clock
                out.mux(picture.encode(frame))
            out.mux(picture.encode(None))
        if audio_codec:
            first = round(audio_start * sample_rate)
            count = round((seconds if audio_seconds is None else audio_seconds) * sample_rate)
            wave = signal((first + np.arange(count)) / sample_rate) * (not silent)
            for begin in range(0, count, 1024):
                block = np.repeat(wave[None, begin : begin + 1024], channels, 0)
                frame = av.AudioFrame.from_ndarray(
                    block.astype(np.float32), format="fltp", layout=LAYOUTS[channels]
                )
                frame.sample_rate, frame.pts = sample_rate, first + begin
                frame.time_base = Fraction(1, sample_rate)
                out.mux(sound.encode(frame))
            out.mux(sound.encode(None))
    return MediaFile(path, times)


def signal(t: np.ndarray) -> np.ndarray:
    """The sound at times `t`: a chord that never repeats within minutes, and the beeps."""
    chord = sum(np.sin(2 * np.pi * f * t) for f in (211.3, 337.7, 523.1, 811.9, 1259.3)) / 8
    return chord + 0.3 * np.sin(2 * np.pi * 2000 * t) * (t % 1 < BEEP)


def frame_numbers(video: np.ndarray) -> list[int]:
    """The numbers drawn in uint8 [3, T, H, W]."""
    height, width = video.shape[2:]
    row = video[:, :, height // 4].mean(0)
    columns = ((np.arange(BITS) + 0.5) * width / BITS).astype(int)
    return [int(sum(1 << i for i, c in enumerate(columns) if line[c] > 127)) for line in row]


def sound_lag(audio: np.ndarray, start: float, sample_rate: int, reach: float = 0.1) -> float:
    """Seconds by which float [L] trails `signal` from `start`, by the best shift within `reach`."""
    edge = round(reach * sample_rate)
    t = start + np.arange(-edge, len(audio) + edge) / sample_rate
    reference = np.fft.rfft(signal(t))
    match = np.fft.irfft(reference * np.fft.rfft(audio, len(t)).conj(), len(t))
    return (edge - int(np.argmax(match[: 2 * edge + 1]))) / sample_rate


def _draw(number, time, size):
    height, width = size
    picture = np.full(size, 20, np.uint8)
    picture[height // 2 :] = 235 if time % 1 < BEEP else 60
    edges = np.linspace(0, width, BITS + 1).astype(int)
    for i in range(BITS):
        picture[: height // 2, edges[i] : edges[i + 1]] = 235 if number >> i & 1 else 16
    return picture


def cut_beginning(path: Path, seconds: float) -> None:
    """Make the edit lists of an MP4 or MOV file skip `seconds`, as a phone's trimmer does."""
    data = bytearray(path.read_bytes())
    (moov,) = _boxes(data, 0, len(data), b"moov")
    (mvhd,) = _boxes(data, *moov, b"mvhd")
    movie_scale = int.from_bytes(data[mvhd[0] + 12 : mvhd[0] + 16])
    for trak in _boxes(data, *moov, b"trak"):
        (mdia,) = _boxes(data, *trak, b"mdia")
        (mdhd,) = _boxes(data, *mdia, b"mdhd")
        media_scale = int.from_bytes(data[mdhd[0] + 12 : mdhd[0] + 16])
        (edts,) = _boxes(data, *trak, b"edts")
        ((elst, _),) = _boxes(data, *edts, b"elst")
        for at, change in ((8, -movie_scale * seconds), (12, media_scale * seconds)):
            field = slice(elst + at, elst + at + 4)
            data[field] = (int.from_bytes(data[field]) + round(change)).to_bytes(4)
    path.write_bytes(data)


def keep_parts(path: Path, parts: list[tuple[float, float]]) -> None:
    """Make the edit lists of an MP4 file show `parts`, (start, seconds), one after another."""
    data = path.read_bytes()
    ((start, end),) = _boxes(data, 0, len(data), b"moov")  # after the media, so that it may grow
    path.write_bytes(data[: start - 8] + _with_parts(data[start - 8 : end], parts))


def _with_parts(box, parts, scale=0):
    """The box with its edit lists replaced; `scale`: ticks a second of the track it is in."""
    kind, content = box[4:8], box[8:]
    if kind == b"elst":
        delay = int.from_bytes(content[12:16])
        edits = [(round(1000 * s), delay + round(a * scale), 1 << 16) for a, s in parts]
        content = bytes(4) + len(edits).to_bytes(4)
        content += b"".join(number.to_bytes(4) for edit in edits for number in edit)
    elif kind in (b"moov", b"trak", b"edts"):
        if kind == b"trak":
            (mdia,) = _boxes(box, 8, len(box), b"mdia")
            ((mdhd, _),) = _boxes(box, *mdia, b"mdhd")
            scale = int.from_bytes(box[mdhd + 12 : mdhd + 16])
        content, at = b"", 8
        while at < len(box):
            size = int.from_bytes(box[at : at + 4])
            content += _with_parts(box[at : at + size], parts, scale)
            at += size
    return (len(content) + 8).to_bytes(4) + kind + content


def _boxes(data, start, end, kind):
    """Content ranges of the boxes of one kind in a range."""
    found = []
    while start < end:
        size = int.from_bytes(data[start : start + 4])
        if data[start + 4 : start + 8] == kind:
            found.append((start + 8, start + size))
        start += size
    return found

"""Clips in and out of media files; the only file that touches PyAV, and only when called.

video uint8 [3, T, H, W], audio float32 [C, L] in [-1, 1], times in seconds on the file's own clock.
"""

import os
import shutil
import tempfile
import wave
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from itertools import pairwise
from math import ceil, floor, gcd, inf
from pathlib import Path

import numpy as np
from einops import rearrange

X264 = {"crf": "16", "bf": "0"}
YUV = {"format": "yuv420p", "dst_colorspace": "ITU709", "dst_color_range": "MPEG"}
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 88200, 96000)
LAYOUTS = ("mono", "stereo", "3.0", "4.0", "5.0", "5.1")  # of AAC, by count
DECODER = 1  # raised when `read_window` comes to give other values for the same file
EDGE = 0.05  # s; sound, coded in blocks, may end this much before the picture: silence is added
GAP = 0.02  # s; a larger jump of the sound's timestamps is a hole, a smaller one is jitter
PREROLL = 0.2  # s of sound decoded before a window: overlapping blocks and bit reservoirs
AUDIBLE = 1e-4  # -80 dB of full scale
HEADED = {"mov", "avi", "wav", "asf", "flac"}  # headers hold durations of streams, not guesses


class MediaError(ValueError):
    """A media file that cannot give what was asked of it: the reason in one line, and the file."""

    def __init__(self, reason: str, path: str | None = None):
        super().__init__(reason)
        self.reason, self.path = reason, path

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.path else self.reason


@dataclass(frozen=True, kw_only=True)
class ClipInfo:
    """What a file holds; times in seconds, height and width as shown (upright, square pixels).

    A modality that cannot be had is in `missing` with the reason.
    """

    video_codec: str | None = None
    video_start: float = 0.0
    video_end: float = 0.0
    fps: float = 0.0
    height: int = 0
    width: int = 0
    audio_codec: str | None = None
    audio_start: float = 0.0
    audio_end: float = 0.0
    sample_rate: int = 0
    channels: int = 0
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(m for m in ("video", "audio") if m not in self.missing)

    def span(self, modalities: Sequence[str]) -> tuple[float, float]:
        """When all of `modalities` are there: start and end."""
        return (
            max(getattr(self, f"{m}_start") for m in modalities),
            min(getattr(self, f"{m}_end") for m in modalities),
        )


def probe(path: str | Path) -> ClipInfo:
    """Streams, rates and times of a file; its first picture, first sound and last packets are read.

    Ends are the header's where it has them (decoded AAC is padded), else the last packets'.
    """
    facts, there = {"missing": {}}, []
    with opened(path) as file:
        for kind, what in (("video", "picture"), ("audio", "sound")):
            stream = stream_of(file, kind)
            found = next(decoded(file, stream), None) if stream else None
            if found is None:
                facts["missing"][kind] = f"{what} stream is empty" if stream else f"no {what}"
                continue
            there.append(stream)
            facts |= {f"{kind}_codec": stream.codec_context.name}
            facts |= {f"{kind}_start": max(0.0, found[0])}
            if kind == "video":
                height, width = _shown(found[1], stream.sample_aspect_ratio)
                rate = float(stream.average_rate or stream.guessed_rate or 0)
                facts |= {"fps": rate, "height": round(height), "width": round(width)}
            else:
                channels = len(found[1].layout.channels)
                facts |= {"sample_rate": found[1].sample_rate, "channels": channels}
        if not there:
            raise MediaError(", ".join(facts["missing"].values()))
        ends = _ends(file, there)
    return ClipInfo(**facts, **{f"{kind}_end": end for kind, end in ends.items()})


def audible(path: str | Path) -> bool:
    """Whether any sample is above -80 dB of full scale; stops at the first, so silence is slow."""
    with opened(path) as file:
        audio = stream_of(file, "audio")
        return audio is not None and any(
            np.abs(_samples(frame)).max(initial=0) > AUDIBLE for _, frame in decoded(file, audio)
        )


def read_window(
    path: str | Path,
    start: float,
    *,
    fps: float | None = None,
    frames: int | None = None,
    size: Sequence[int] | None = None,
    fit: str = "crop",
    sample_rate: int | None = None,
    samples: int | None = None,
    channels: int | None = None,
    modalities: Sequence[str] = ("video", "audio"),
    snap: bool = True,
) -> dict:
    """`frames` pictures and `samples` of sound from one start time, found by seeking.

    With a picture the start moves to the nearest source frame if that is within half a frame of
    `fps`, unless not to `snap`; picture k is the source frame nearest to start + k / fps. `size`
    None keeps the source's, `fit` is crop or letterbox. `channels` 1 is the mean of all, 2 the
    first two (mono twice), None what is there. Returns `video`, `audio` and the `start` used.
    """
    window = {"start": float(start)}
    with opened(path) as file:
        if "video" in modalities:
            stream = stream_of(file, "video")
            if stream is None:
                raise MediaError("no picture")
            origin, pictures = _picture(file, stream, start, fps, frames, size, fit, snap)
            window |= {"start": origin, "video": pictures}
        if "audio" in modalities:
            stream = stream_of(file, "audio")
            if stream is None:
                raise MediaError("no sound")
            slack = EDGE + (0.5 / fps if "video" in modalities else 0)
            sound = _sound(file, stream, window["start"], sample_rate, samples, channels, slack)
            window["audio"] = sound
    return window


def read_clip(
    path: str | Path,
    *,
    fps: float | None = None,
    size: Sequence[int] | None = None,
    fit: str = "crop",
    sample_rate: int | None = None,
    channels: int | None = None,
    modalities: Sequence[str] | None = None,
) -> dict:
    """A whole short file: `video` and `fps`, `audio` and `sample_rate`, while both are there."""
    info = probe(path)
    modalities = info.modalities if modalities is None else tuple(modalities)
    for modality in set(modalities) & set(info.missing):
        raise MediaError(info.missing[modality], str(path))
    start, end = info.span(modalities)
    fps, sample_rate = fps or info.fps, sample_rate or info.sample_rate
    clip = read_window(
        path,
        start,
        fps=fps,
        frames=max(1, round((end - start) * fps)),
        size=size,
        fit=fit,
        sample_rate=sample_rate,
        samples=max(1, round((end - start) * sample_rate)),
        channels=channels,
        modalities=modalities,
    )
    rates = {"video": ("fps", fps), "audio": ("sample_rate", sample_rate)}
    return clip | dict(rates[m] for m in modalities)


def _picture(file, stream, start, fps, frames, size, fit, snap):
    """The start used and uint8 [3, frames, H, W]."""
    scaled = _Scaler(stream, size, fit)
    origin, before, pixels, shown, pictures = None, None, None, None, []
    for now in decoded(file, stream, start):
        if origin is None and now[0] >= start:
            origin = _snapped(start, [f[0] for f in (before, now) if f], fps) if snap else start
            if before is None and now[0] > origin + 0.5 / fps:
                raise MediaError(f"picture begins at {now[0]:.2f} s, the window at {start:.2f} s")
        while origin is not None and len(pictures) < frames:
            time = origin + len(pictures) / fps
            if time > now[0]:
                break
            nearest = before if before and time - before[0] <= now[0] - time else now
            if nearest is not shown:
                shown, pixels = nearest, scaled(nearest[1])
            pictures.append(pixels)
        if len(pictures) == frames:
            break
        before = now
    else:  # the file has ended; its last frame stays for its duration
        if before is None:
            raise MediaError("no picture can be decoded")
        time, frame = before
        if origin is None:
            origin = _snapped(start, [time], fps) if snap else start
        held = float(frame.duration * frame.time_base) if frame.duration else 0
        end = time + max(held, 1 / float(stream.average_rate or fps))
        if origin + (frames - 1) / fps > end + 0.5 / fps:
            raise MediaError(f"picture ends at {end:.2f} s, inside the window from {origin:.2f} s")
        pictures += [scaled(frame)] * (frames - len(pictures))
    return origin, rearrange(np.stack(pictures), "t h w c -> c t h w")


def _snapped(start, times, fps):
    nearest = min(times, key=lambda time: abs(time - start))
    return nearest if abs(nearest - start) <= 0.5 / fps + 1e-6 else start


class _Scaler:
    """Frame to uint8 [H, W, 3]: square pixels, upright, antialiased, cropped or framed."""

    def __init__(self, stream, size, fit):
        from av.video.reformatter import VideoReformatter

        if fit not in ("crop", "letterbox"):
            raise ValueError(f"fit is crop or letterbox, not {fit}")
        self.aspect, self.size, self.fit = stream.sample_aspect_ratio, size, fit
        self.reformat = VideoReformatter().reformat

    def __call__(self, frame):
        height, width = _shown(frame, self.aspect)
        size = self.size or (round(height), round(width))
        scale = (max if self.fit == "crop" else min)(size[0] / height, size[1] / width)
        scaled = max(1, round(height * scale)), max(1, round(width * scale))
        turns = round(frame.rotation / 90) % 4
        height, width = scaled[::-1] if turns % 2 else scaled
        picture = self.reformat(
            frame, width, height, "rgb24", interpolation=exact_bicubic(), threads=1
        ).to_ndarray()
        picture = np.rot90(picture, turns)
        top, left = abs(scaled[0] - size[0]) // 2, abs(scaled[1] - size[1]) // 2
        if self.fit == "crop":
            return picture[top : top + size[0], left : left + size[1]]
        framed = np.zeros((*size, 3), np.uint8)
        framed[top : top + scaled[0], left : left + scaled[1]] = picture
        return framed


@cache
def exact_bicubic():
    """Without its exact variants swscale is two levels too dark."""
    from av.video.reformatter import Interpolation as Flag

    return Flag.BICUBIC | Flag.ACCURATE_RND | Flag.FULL_CHR_H_INT | Flag.FULL_CHR_H_INP


def _shown(frame, aspect):
    """Height and width as displayed: square pixels, upright."""
    shape = frame.height, frame.width * float(aspect or 1)
    return shape[::-1] if round(frame.rotation / 90) % 2 else shape


def _sound(file, stream, start, sample_rate, samples, channels, slack):
    """float32 [channels, samples] from the source's sample nearest to `start`.

    Holes are silence, as a player would have it, and so are `slack` seconds at either end.
    """
    blocks = []
    seconds = samples / sample_rate
    for time, frame in decoded(file, stream, start - PREROLL):
        rate = frame.sample_rate
        if time + frame.samples / rate < start - PREROLL:
            continue
        blocks.append((time * rate, _samples(frame)))
        # filter edge: whole periods of both rates, so that output sample 0 falls on `start`
        period = rate // gcd(rate, sample_rate)
        edge = period * ceil(0.02 * rate / period)
        first, count = round(start * rate) - edge, ceil(seconds * rate) + 2 * edge
        if time * rate + frame.samples >= first + count + GAP * rate:
            break
    if not blocks:
        raise MediaError("no sound can be decoded")

    source = np.zeros((blocks[0][1].shape[0], count), np.float32)
    begin, end = inf, -inf
    for offset, run in _runs(blocks, GAP * rate):
        begin, end = min(begin, offset / rate), max(end, (offset + run.shape[1]) / rate)
        a, b = max(offset - first, 0), min(offset + run.shape[1] - first, count)
        if a < b:
            source[:, a:b] = run[:, a + first - offset : b + first - offset]
    if begin > start + slack or end < start + seconds - slack:
        raise MediaError(
            f"sound lasts from {begin:.2f} to {end:.2f} s, not the window's "
            f"{start:.2f} to {start + seconds:.2f} s"
        )
    sound = _resampled(_mixed(source, channels), rate, sample_rate)
    sound = sound[:, edge * sample_rate // rate :]
    return np.ascontiguousarray(np.clip(sound[:, :samples], -1, 1))


def _runs(blocks, gap):
    """Blocks of (position, samples) joined where no hole is; the median places each run."""
    starts = np.cumsum([0] + [block.shape[1] for _, block in blocks])[:-1]
    offsets = np.array([position for position, _ in blocks]) - starts
    holes = np.flatnonzero(np.abs(np.diff(offsets)) > gap) + 1
    for members in np.split(np.arange(len(blocks)), holes):
        run = np.concatenate([blocks[i][1] for i in members], 1)
        yield round(np.median(offsets[members]) + starts[members[0]]), run


def _samples(frame):
    """float32 [C, n] of a decoded block in any of FFmpeg's sample formats."""
    if frame.format.name == "fltp" and len(frame.planes) == 1:  # the same, in a third of the time
        return np.frombuffer(frame.planes[0], np.float32, frame.samples)[None]
    block = frame.to_ndarray()
    if not frame.format.is_planar:
        block = rearrange(block, "1 (n c) -> c n", c=len(frame.layout.channels))
    if block.dtype == np.uint8:
        return (block.astype(np.float32) - 128) / 128
    if block.dtype.kind == "i":
        return block.astype(np.float32) / -float(np.iinfo(block.dtype).min)
    return block.astype(np.float32, copy=False)


def _mixed(block, channels):
    if channels == 1:
        return block.mean(0, keepdims=True)
    if channels == 2:
        return block[[0, 0]] if len(block) == 1 else block[:2]
    return block


def _resampled(sound, rate, sample_rate):
    """FFmpeg's resampler: aligned at the first sample, exact to -90 dB below 0.8 of Nyquist."""
    import av

    if rate == sample_rate:
        return sound
    channels = []
    for channel in sound:
        frame = av.AudioFrame.from_ndarray(channel[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        resample = av.AudioResampler("fltp", "mono", sample_rate)
        pieces = resample.resample(frame) + resample.resample(None)
        channels.append(np.concatenate([piece.to_ndarray() for piece in pieces], 1))
    return np.concatenate(channels)


@contextmanager
def opened(path) -> Iterator:
    """The opened file; whatever FFmpeg says against it becomes a MediaError that names it."""
    import av

    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with av.open(path, metadata_errors="replace") as file:
            yield file
    except av.FFmpegError as error:
        raise MediaError(f"unreadable: {error.strerror}", path) from error
    except MediaError as error:
        error.path = path
        raise


def stream_of(file, kind):
    """The stream a player would choose; cover art is no video."""
    from av.stream import Disposition

    stream = file.streams.best(kind)
    if stream is None or stream.codec_context is None:  # none, or no decoder for it
        return None
    if Disposition.attached_pic in stream.disposition:
        return None
    stream.codec_context.thread_count = 1  # workers are many: a thread for each file, not many
    return stream


def decoded(file, stream, start=-inf):
    """(time, frame) in order, the first at or before `start`, or the very first; those between it
    and the last before `start` may be missing.

    Some containers seek too late and some not at all: then further back, and at last from the top.
    """
    import av
    from av.stream import Discard

    for other in file.streams:  # the demuxer passes over what is not read
        other.discard = Discard.default if other is stream else Discard.all
    begins = float((stream.start_time or 0) * stream.time_base)
    start = max(start, begins - 1)  # a little early: AAC needs the block before the first
    for back in (0, 2, 10):
        try:
            file.seek(floor((start - back) / stream.time_base), stream=stream)
        except av.FFmpegError:
            break
        frames = _onwards(file, stream, start)
        first = next(frames, None)
        if first is not None and first[0] <= max(start, begins) + 1e-6:
            yield first
            yield from frames
            return
    with opened(file.name) as again:
        yield from _onwards(again, again.streams[stream.index])


def _onwards(file, stream, start=-inf):
    import av

    started = False
    numerator, denominator = stream.time_base.as_integer_ratio()
    for packet in _sparing(file.demux(stream), stream, start):
        try:
            frames = packet.decode()
        except av.InvalidDataError:
            if started:
                raise
            continue  # a seek may land inside a block
        for frame in frames:
            started = True
            if frame.pts is None:
                raise MediaError("frames without times")
            yield frame.pts * numerator / denominator, frame


def _sparing(packets, stream, start):
    """Packets, and word to the decoder which it need not decode: of H.264, before the last frame
    at `start`, those that no other frame refers to."""
    context, ahead, times = stream.codec_context, [], []
    if context.name == "h264" and start > -inf:
        tick = start / float(stream.time_base)
        for packet in packets:
            ahead.append(packet)
            if packet.pts is None or packet.dts is None:
                times.clear()
                break
            times.append(packet.pts)
            if packet.dts > tick:  # all that are shown until then have come
                break
        shown = max((time for time in times if time <= tick), default=-inf)
        for packet, time in zip(ahead, times, strict=False):
            context.skip_frame = "NONREF" if time < shown else "DEFAULT"
            yield packet
        context.skip_frame = "DEFAULT"
    yield from ahead[len(times) :]
    yield from packets


def _ends(file, streams):
    """Seconds at which each stream ends: what the header says, if the packets are really there."""
    import av

    last = {}
    kinds = set(file.format.name.split(","))
    file_end = (file.duration or 0) / av.time_base
    if "matroska" not in kinds:  # its duration is the time of its end
        file_end += (file.start_time or 0) / av.time_base
    for tail in (2, inf):
        with opened(file.name) as again:
            if tail < file_end:
                again.seek(int((file_end - tail) * av.time_base))
            for packet in again.demux([again.streams[s.index] for s in streams]):
                if packet.pts is not None and not packet.is_corrupt:
                    end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                    last[packet.stream_index] = max(end, last.get(packet.stream_index, end))
        if len(last) == len(streams):
            break

    ends = {}
    for stream in streams:
        ends[stream.type] = last.get(stream.index, 0.0)
        if HEADED & kinds and stream.duration:
            promised = float(((stream.start_time or 0) + stream.duration) * stream.time_base)
            _check_whole(promised, ends[stream.type])
            ends[stream.type] = min(promised, ends[stream.type])
    if "matroska" in kinds:
        _check_whole(file_end, max(ends.values()))
    return ends


def _check_whole(promised, end):
    if end < promised - 0.5:
        raise MediaError(f"truncated: {promised:.2f} s promised, data until {end:.2f} s")


def write_mp4(
    path: str | Path,
    video: np.ndarray,
    audio: np.ndarray | None = None,
    *,
    fps: float | Fraction,
    sample_rate: int | None = None,
) -> Path:
    """H.264 (yuv420p, BT.709) and AAC, index in front; the sound is made as long as the picture.

    Odd heights and widths are refused: yuv420p has half as many colour samples.
    """
    codecs = ("libx264", X264), ("aac", AAC_RATES)
    return _write(path, video, audio, fps, sample_rate, "mp4", codecs)


def write_webm(
    path: str | Path,
    video: np.ndarray,
    audio: np.ndarray | None = None,
    *,
    fps: float | Fraction,
    sample_rate: int | None = None,
) -> Path:
    """VP9 (yuv420p, BT.709) and Opus; the sound is made as long as the picture."""
    vp9 = {"crf": "20", "b": "0", "cpu-used": "5", "lag-in-frames": "0"}
    codecs = ("libvpx-vp9", vp9), ("libopus", (48000,))
    return _write(path, video, audio, fps, sample_rate, "webm", codecs)


def mp4_bytes(
    video: np.ndarray,
    audio: np.ndarray | None = None,
    *,
    fps: float | Fraction,
    sample_rate: int | None = None,
) -> bytes:
    """The file `write_mp4` would write, for a page or a logger that embeds it."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_mp4(Path(folder, "clip.mp4"), video, audio, fps=fps, sample_rate=sample_rate)
        return path.read_bytes()


def write_wav(path: str | Path, audio: np.ndarray, *, sample_rate: int) -> Path:
    """16-bit PCM of up to 8 channels, rounded and clipped to [-1, 1]."""
    audio = _checked_audio(audio, 8)
    with replacing(path) as part, wave.open(str(part), "wb") as file:
        file.setnchannels(audio.shape[0])
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(pcm16(audio).T.tobytes())
    return Path(path)


def write_gif(path: str | Path, video: np.ndarray, *, fps: float | Fraction) -> Path:
    """An endless silent GIF; its clock ticks in 1/100 s, so delays alternate where fps needs it."""
    from PIL import Image

    frames = [Image.fromarray(frame) for frame in _frames(video)]
    ticks = [round(100 * k / _rate(fps)) for k in range(len(frames) + 1)]
    delays = [10 * (b - a) for a, b in pairwise(ticks)]
    with replacing(path) as part:
        first, *rest = frames
        first.save(part, "GIF", save_all=True, append_images=rest, duration=delays, loop=0)
    return Path(path)


def write_png(path: str | Path, video: np.ndarray) -> Path:
    """All frames side by side in one picture."""
    from PIL import Image

    strip = rearrange(_frames(video), "t h w c -> h (t w) c")
    with replacing(path) as part:
        Image.fromarray(strip).save(part, "PNG")
    return Path(path)


def write_frames(path: str | Path, video: np.ndarray) -> Path:
    """A folder of all frames, `00000000.png` and so on, which appears when it is complete."""
    from PIL import Image

    with replacing(path) as part:
        part.mkdir()
        for k, frame in enumerate(_frames(video)):
            Image.fromarray(frame).save(part / f"{k:08d}.png")
    return Path(path)


def _write(path, video, audio, fps, sample_rate, container, codecs):
    (video_codec, options), (audio_codec, rates) = codecs
    seconds = _frames(video).shape[0] / _rate(fps)
    with new_container(path, container) as out:
        parts = [picture_in(out, video, fps, video_codec, options)]
        if audio is not None:
            parts.append(sound_in(out, audio, sample_rate, seconds, audio_codec, rates))
        for send in parts:
            send()
    return Path(path)


@contextmanager
def new_container(path: str | Path, container: str, clock: int = 1000) -> Iterator:
    """An output that takes the place of `path` once it is complete; streams lie interleaved.

    `clock`: ticks a second in which MP4 and QuickTime say when a stream begins and ends.
    """
    import av

    options = {"max_interleave_delta": "0"}
    if container in ("mp4", "mov"):
        options["movflags"] = "+faststart"
        options["movie_timescale"] = str(min(clock, 2**31 - 1))
    with replacing(path) as part, av.open(str(part), "w", container, options=options) as out:
        yield out


def picture_in(out, video, fps, codec="libx264", options=X264) -> Callable[[], None]:
    """Adds a stream of uint8 [3, T, H, W]; what is returned sends it, after all are added."""
    import av
    from av.video.reformatter import VideoReformatter

    frames, rate = _frames(video), _rate(fps)
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"height and width must be even for yuv420p video, got {height}x{width}")
    stream = out.add_stream(codec, rate=rate, options=options)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.time_base = stream.codec_context.time_base = 1 / rate
    stream.codec_context.colorspace = stream.codec_context.color_primaries = 1  # BT.709
    stream.codec_context.color_trc, stream.codec_context.color_range = 1, 1
    convert = VideoReformatter().reformat

    def send():
        for k, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = convert(frame, interpolation=exact_bicubic(), threads=1, **YUV)
            frame.pts, frame.time_base = k, 1 / rate
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))

    return send


def sound_in(
    out, audio, sample_rate, seconds, codec="aac", rates=AAC_RATES, layout=None, most=128_000
) -> Callable[[], None]:
    """Adds a stream of float [C, L], cut or filled with silence; what is returned sends it.

    `most`: bits a second for each channel.
    """
    import av

    if not sample_rate:
        raise ValueError("audio needs its sample_rate")
    audio = _checked_audio(audio, 8 if layout else 2)[:, : round(sample_rate * seconds)]
    audio = np.pad(audio, ((0, 0), (0, round(sample_rate * seconds) - audio.shape[1])))
    layout = layout or LAYOUTS[audio.shape[0] - 1]
    coded = layout.split("(")[0]
    coded = coded if coded in LAYOUTS else "stereo"
    coded_rate = min((r for r in rates if r >= sample_rate), default=rates[-1])
    stream = out.add_stream(codec, rate=coded_rate, layout=coded)
    stream.bit_rate = min(most, 4 * coded_rate) * audio.shape[0]

    def send():
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(audio), format="fltp", layout=layout
        )
        frame.sample_rate, frame.pts, frame.time_base = sample_rate, 0, Fraction(1, sample_rate)
        resample = av.AudioResampler(stream.codec_context.format, coded, coded_rate).resample
        for piece in resample(frame) + resample(None):
            out.mux(stream.encode(piece))
        out.mux(stream.encode(None))

    return send


@contextmanager
def replacing(path) -> Iterator[Path]:
    """A name beside `path` that takes its place if the block succeeds and vanishes if it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        if part.is_dir():  # which takes the place of an empty folder alone
            shutil.rmtree(path, ignore_errors=True)
        os.replace(part, path)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)


def _frames(video):
    """uint8 [3, T, H, W] as [T, H, W, 3]."""
    video = np.asarray(video)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape:
        raise ValueError(f"video must be uint8 [3, T, H, W], got {video.dtype} {video.shape}")
    return rearrange(video, "c t h w -> t h w c")


def _checked_audio(audio, most=2):
    audio = np.asarray(audio, np.float32)
    if audio.ndim != 2 or not 1 <= audio.shape[0] <= most:
        raise ValueError(f"audio must be float [1 to {most}, L], got {audio.shape}")
    return np.clip(audio, -1, 1)


def pcm16(audio: np.ndarray) -> np.ndarray:
    """float [-1, 1] as int16, to the nearest level and clipped to the last one: 1 is 32767.

    As `_samples` reads it: what was read from 16-bit PCM is written as it was.
    """
    return np.clip(np.round(audio * 32768), -32768, 32767).astype("<i2")


def _rate(fps):
    return Fraction(fps).limit_denominator(1001)

"""Clips with the picture or the sound of another file: its packets, or else encoded anew."""

from collections.abc import Callable
from fractions import Fraction
from itertools import chain
from math import inf
from pathlib import Path

import numpy as np

from avdiffusion.io import (
    EDGE,
    LAYOUTS,
    YUV,
    MediaError,
    decoded,
    exact_bicubic,
    new_container,
    opened,
    picture_in,
    probe,
    read_window,
    sound_in,
    stream_of,
)

# what MP4 holds and browsers play; players may lack HEVC, which phones record
COPIED = {"video": {"h264", "hevc", "av1", "vp9"}, "audio": {"aac", "mp3", "opus", "flac"}}
X264 = {"crf": "10", "bf": "0"}
TICK = Fraction(1, 90000)  # s
CLOCK = 2e-3  # s; Matroska's times are whole milliseconds
PRIMING = 0.1  # s of sound before the start that an edit list may hide
AAC_BITS = 256_000  # a second and channel at most


def write_with(
    path: str | Path,
    source: str | Path,
    keep: str,
    *,
    start: float,
    seconds: float,
    video: np.ndarray | None = None,
    fps: float | None = None,
    audio: np.ndarray | None = None,
    sample_rate: int | None = None,
) -> str:
    """An MP4 of `keep` (video or audio) as in `source` from `start`, beside what is given here.

    A kept picture has the source's size, frame times, rotation and pixel shape, a kept sound its
    rate and channels. Packets are copied ("copied" is returned) if MP4 and browsers know their
    codec, the stream begins at `start`, and it ends with the clip or can be cut there: at any
    block of sound, but only at pictures that no earlier one refers to. Else they are encoded
    ("encoded"), H.264 at crf 10 (an odd size repeats its last row or column) or AAC.
    """
    with opened(source) as file, new_container(path, "mp4") as out:
        stream = stream_of(file, keep)
        if stream is None:
            raise MediaError("no picture" if keep == "video" else "no sound")
        packets = _copyable(file, stream, start, seconds)
        parts = [] if video is None else [picture_in(out, video, fps)]
        if packets:
            parts.append(_copied(out, stream, packets, start))
        elif keep == "video":
            parts.append(_encoded_picture(out, file, stream, start, seconds))
        else:
            parts.append(_encoded_sound(out, source, stream, start, seconds))
        if audio is not None:
            parts.append(sound_in(out, audio, sample_rate, seconds))
        for send in parts:
            send()
    return "copied" if packets else "encoded"


def sound_of(source: str | Path, start: float, seconds: float) -> tuple[np.ndarray, int]:
    """The sound of a file as it is, float32 [C, L], and its sample rate."""
    rate = probe(source).sample_rate
    window = read_window(
        source, start, sample_rate=rate, samples=round(rate * seconds), modalities=["audio"]
    )
    return window["audio"], rate


def _copyable(file, stream, start, seconds):
    """The packets that show [start, start + seconds], in decoding order; none if that cannot be."""
    end, is_video = start + seconds, stream.type == "video"
    if stream.codec_context.codec.canonical_name not in COPIED[stream.type]:
        return []
    packets, complete = [], True
    for packet in file.demux(stream):
        if packet.dts is not None and packet.dts * packet.time_base > end + 1:
            complete = False  # nothing that follows is shown before the end
            break
        if packet.size:
            packets.append(packet)
    if not packets or any(packet.pts is None for packet in packets):
        return []
    tick = float(stream.time_base)
    frame = float(1 / (stream.average_rate or 25)) if is_video else 0
    begins = np.array([packet.pts * tick for packet in packets])
    ends = begins + [packet.duration * tick or frame for packet in packets]

    hidden = np.array([packet.is_discard for packet in packets])  # by an edit list
    first = np.argmin(np.where(hidden, inf, begins))
    late = begins[first] > start + CLOCK
    early = begins[first] < start - (CLOCK if is_video else PRIMING)
    if hidden.all() or late or early or (hidden & (begins > start)).any():
        return []
    if complete and ends.max() <= end + (max(EDGE, frame / 2) if is_video else 0):
        packets[-1].duration = packets[-1].duration or round(frame / tick)
        return packets
    wanted = begins < end - max(min(frame / 2, EDGE), CLOCK)
    count = int(np.flatnonzero(wanted).max(initial=-1)) + 1
    if not wanted[:count].all():
        return []
    packets[count - 1].duration = round((end - begins[:count].max()) / tick)
    return packets[:count]


def _copied(out, stream, packets, start) -> Callable[[], None]:
    target = out.add_stream_from_template(stream)
    target.time_base = stream.time_base
    zero = round(start / stream.time_base)
    if stream.type == "video":  # at most CLOCK from it
        zero = min(packet.pts for packet in packets if not packet.is_discard)
    order = sorted(packet.pts for packet in packets)  # Matroska has no decoding times
    lag = max(at - packet.pts for at, packet in zip(order, packets, strict=True))

    def send():
        for at, packet in zip(order, packets, strict=True):
            packet.stream = target
            packet.pts, packet.dts = packet.pts - zero, at - lag - zero
            out.mux(packet)

    return send


def _encoded_picture(out, file, stream, start, seconds) -> Callable[[], None]:
    import av
    from av.video.reformatter import VideoReformatter

    frames = _shown(file, stream, start, start + seconds)
    first = next(frames)
    source = first[2]
    height, width = source.height + source.height % 2, source.width + source.width % 2
    target = out.add_stream("libx264", rate=stream.average_rate or 25, options=X264)
    target.height, target.width, target.pix_fmt = height, width, "yuv420p"
    context = target.codec_context
    target.time_base = context.time_base = TICK
    context.sample_aspect_ratio = stream.sample_aspect_ratio or 1
    colours = "colorspace", "color_primaries", "color_trc"
    as_it_is = source.format.name == "yuv420p" and (height, width) == (source.height, source.width)
    for name in colours:
        setattr(context, name, getattr(source, name) if as_it_is else 1)  # BT.709
    context.color_range = 1
    if source.rotation:
        target.set_display_rotation(source.rotation)
    convert = VideoReformatter().reformat

    def fitting(frame):
        if as_it_is and frame.format.name == "yuv420p":
            return convert(frame, width, height, threads=1)
        rows, columns = height - source.height, width - source.width
        if rows or columns:
            pixels = frame.to_ndarray(format="rgb24", width=source.width, height=source.height)
            pixels = np.pad(pixels, ((0, rows), (0, columns), (0, 0)), "edge")
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        return convert(frame, width, height, interpolation=exact_bicubic(), threads=1, **YUV)

    def send():
        lasts = {}
        for at, duration, frame in chain([first], frames):
            frame = fitting(frame)
            frame.pts, frame.time_base, frame.pict_type = at, TICK, 0
            lasts[at] = duration
            for packet in target.encode(frame):
                packet.duration = lasts.pop(packet.pts)
                out.mux(packet)
        for packet in target.encode(None):
            packet.duration = lasts.pop(packet.pts)
            out.mux(packet)

    return send


def _shown(file, stream, start, end):
    """(tick at which it appears, ticks it stays, frame): that of the start, and on to the end."""
    before, stop = None, round((end - start) / TICK)
    for time, frame in decoded(file, stream, start):
        at = round((time - start) / TICK) if time > start + CLOCK else 0
        if time >= end - CLOCK:
            break
        if before and at > before[0]:
            yield before[0], at - before[0], before[1]
        before = at, frame
    if before is None:
        raise MediaError(f"no picture between {start:.2f} and {end:.2f} s")
    yield before[0], stop - before[0], before[1]


def _encoded_sound(out, source, stream, start, seconds) -> Callable[[], None]:
    sound, rate = sound_of(source, start, seconds)
    layout = stream.codec_context.layout.name
    if "channels" in layout:  # nobody says where they stand
        sound = sound[: len(LAYOUTS)]
        layout = LAYOUTS[len(sound) - 1]
    return sound_in(out, sound, rate, seconds, layout=layout, most=AAC_BITS)

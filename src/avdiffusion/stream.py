"""Clips of any length with other pictures: each goes through a function, the sound is kept."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from io import BytesIO
from math import inf, lcm
from pathlib import Path

import numpy as np
from einops import rearrange

from avdiffusion.io import (
    X264,
    YUV,
    MediaError,
    exact_bicubic,
    new_container,
    opened,
    probe,
    stream_of,
)
from avdiffusion.mux import COPIED
from avdiffusion.writer import Behind

CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
UNSPECIFIED = 2  # of FFmpeg's primaries and transfer characteristics


def rewrite(
    source: str | Path,
    target: str | Path,
    change: Callable[[np.ndarray], np.ndarray],
    *,
    frames: int = 16,
    progress: Callable[[int], object] | None = None,
) -> Path:
    """Writes `source` with other pictures at the same times and the same sound; returns the file.

    `change` is given up to `frames` pictures at a time, uint8 [3, T, h, w], upright, and returns as
    many, uint8 [3, T, H, W] of one size. They are encoded as they come (H.264, crf 16, BT.709; an
    odd size repeats its last row or column), so what is held of a clip does not grow with its
    length. `progress` is told how many were changed. The packets of every sound track that FFmpeg
    knows are copied; subtitles are left out. The suffix of `target` becomes that of `place`.
    """
    target, info = place(source, target), probe(source)
    if "video" in info.missing:
        raise MediaError(info.missing["video"], str(source))
    with opened(source) as file:
        picture, sounds = stream_of(file, "video"), _sounds(file)
        clock = lcm(*(stream.time_base.denominator for stream in (picture, *sounds)))
        with new_container(target, CONTAINERS[target.suffix], clock) as out:
            out.metadata.update(file.metadata)
            film = _Film(out, picture, sounds, _origin(file))
            with Behind(film.add, most=1) as add:
                for shown, heard in _runs(file, picture, sounds, frames):
                    add(shown, change(_pixels(shown)), heard)
                    if progress:
                        progress(len(shown))
            film.end()
    return target


def place(source: str | Path, target: str | Path) -> Path:
    """`target` with the suffix of a container in which the sound of `source` stays as it is.

    Matroska (and WebM) with sound remains that: its times, whole milliseconds, name no sample in
    other containers. Else it is MP4 if browsers play the codec in it, QuickTime (PCM) or Matroska.
    """
    with opened(source) as file:
        contexts = [stream.codec_context for stream in _sounds(file)]
    milliseconds = contexts and "matroska" in file.format.name
    suffixes = [".mkv"] if milliseconds else list(CONTAINERS)
    if not {context.codec.canonical_name for context in contexts} <= COPIED["audio"]:
        suffixes = [suffix for suffix in suffixes if suffix != ".mp4"]
    codecs = {context.name for context in contexts}
    for suffix in suffixes:
        if codecs <= _held(CONTAINERS[suffix]):
            return Path(target).with_suffix(suffix)
    raise MediaError(f"no container for sound in {', '.join(sorted(codecs))}", str(source))


def _sounds(file):
    return [stream for stream in file.streams.audio if stream.codec_context is not None]


def _held(container):
    """The names of codecs of which a container takes packets."""
    import av

    with av.open(BytesIO(), "w", container) as out:
        return out.supported_codecs


def _origin(file):
    """Seconds at which the new file's clock begins: a broadcast's own one shows any time at all."""
    import av
    from av.format import Flags

    arbitrary = file.format.flags & Flags.ts_discont.value
    return (file.start_time or 0) / av.time_base if arbitrary else 0


def _runs(file, picture, sounds, frames) -> Iterator[tuple[list, list]]:
    """Up to `frames` decoded pictures, and the packets of sound read meanwhile."""
    shown, heard, last, begun = [], [], -inf, set()
    for packet in file.demux(picture, *sounds):
        if packet.stream is not picture:
            if packet.size:
                _check_sound(packet, packet.stream in begun)
                heard.append(packet)
                begun |= set() if packet.is_discard else {packet.stream}
            continue
        for frame in packet.decode():
            if frame.pts is None or frame.pts <= last:
                raise MediaError("pictures without times of their own")
            if len(shown) == frames:
                yield shown, heard
                shown, heard = [], []
            shown.append(frame)
            last = frame.pts
    if shown:
        yield shown, heard


def _check_sound(packet, begun):
    if packet.pts is None or packet.dts is None:
        raise MediaError("sound without times")
    if packet.is_discard and begun:
        raise MediaError("an edit list hides sound in its middle: save the clip anew")


def _pixels(shown):
    """uint8 [3, T, h, w] of decoded pictures, upright and in the size of the first."""
    from av.video.reformatter import VideoReformatter

    convert, first = VideoReformatter().reformat, shown[0]
    options = {"format": "rgb24", "interpolation": exact_bicubic(), "threads": 1}
    pictures = [convert(each, first.width, first.height, **options) for each in shown]
    upright = np.rot90(np.stack([each.to_ndarray() for each in pictures]), _turns(first), (1, 2))
    return np.ascontiguousarray(rearrange(upright, "t h w c -> c t h w"))


def _turns(frame):
    return round(frame.rotation / 90) % 4


class _Film:
    """The streams of the new file: pictures encoded and packets copied at the times they had."""

    def __init__(self, out, picture, sounds, origin):
        from av.video.reformatter import VideoReformatter

        self.convert = VideoReformatter().reformat
        self.out, self.picture, self.origin = out, picture, origin
        rate = picture.average_rate or picture.guessed_rate or 25
        self.stream = out.add_stream("libx264", rate=rate, options=X264)
        self.stream.time_base = self.stream.codec_context.time_base = picture.time_base
        self.copies = {sound: out.add_stream_from_template(sound) for sound in sounds}
        for sound in sounds:
            self.copies[sound].metadata.update(sound.metadata)

    def add(self, shown, video, heard):
        if not self.stream.codec_context.is_open:
            self._describe(shown[0], *video.shape[2:])
        for packet in heard:
            zero = round(self.origin / packet.time_base)
            packet.stream = self.copies[packet.stream]
            packet.pts, packet.dts = packet.pts - zero, packet.dts - zero
            self.out.mux(packet)
        for frame, pixels in zip(shown, rearrange(video, "c t h w -> t h w c"), strict=True):
            self.out.mux(self.stream.encode(self._encodable(frame, pixels)))

    def end(self):
        self.out.mux(self.stream.encode(None))

    def _encodable(self, shown, pixels):
        import av

        rows, columns = (side % 2 for side in pixels.shape[:2])
        pixels = np.pad(pixels, ((0, rows), (0, columns), (0, 0)), "edge")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame = self.convert(frame, interpolation=exact_bicubic(), threads=1, **YUV)
        frame.pts, frame.duration = shown.pts - round(self.origin / shown.time_base), shown.duration
        frame.time_base = shown.time_base
        return frame

    def _describe(self, shown, height, width):
        """What the header says of the picture; it is written with the first packet of any kind."""
        context, aspect = self.stream.codec_context, Fraction(self.picture.sample_aspect_ratio or 1)
        context.height, context.width = height + height % 2, width + width % 2
        context.pix_fmt = "yuv420p"
        context.sample_aspect_ratio = 1 / aspect if _turns(shown) % 2 else aspect
        context.colorspace = context.color_range = 1  # BT.709
        for name in ("color_primaries", "color_trc"):  # wide gamuts and HDR stay what they are
            known = getattr(shown, name)
            setattr(context, name, 1 if known == UNSPECIFIED else known)

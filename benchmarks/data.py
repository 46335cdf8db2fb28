"""Windows a second of the data path: decoding beside a plain PyAV loop, kept windows, loaders.

python benchmarks/data.py                                # on clips that it makes itself
python benchmarks/data.py --root data/pouring/train --json data.json
python benchmarks/data.py --root data/pouring/train --against data.json
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from machine import Report, copy_rate, options
from torch.utils.data import DataLoader

from avdiffusion.data.clips import Clips
from avdiffusion.data.index import build_index
from avdiffusion.data.module import Draws, EndlessBatches, collate
from avdiffusion.data.toy import Toy
from avdiffusion.io import exact_bicubic, read_window, write_mp4

WINDOW = {"fps": 10, "frames": 16, "sample_rate": 16000, "samples": 25600, "channels": 1}
QUICKSTART = {"size": [24, 24], "sample_rate": 4000, "samples": 6400, "colours": 2}
QUICKSTART |= {"background": "plain", "radius": [0.17, 0.18], "speed": [0.95, 1.05]}


def plain(path, start, size, interpolation):
    """What must be done for a window, and nothing else: seek, decode, scale what is shown; seek,
    decode, resample. No care for odd timestamps, gaps, rotation, cropping or levels."""
    with av.open(str(path)) as file:
        video, audio = file.streams.video[0], file.streams.audio[0]
        video.codec_context.thread_count = audio.codec_context.thread_count = 1
        file.seek(int(start / video.time_base), stream=video)
        scale, pictures, half = VideoReformatter().reformat, [], 0.5 / float(video.average_rate)
        for frame in file.decode(video):
            time_of, shown = frame.time, None
            while len(pictures) < WINDOW["frames"]:
                if start + len(pictures) / WINDOW["fps"] > time_of + half:
                    break
                if shown is None:
                    factor = max(size / frame.height, size / frame.width)
                    height, width = round(frame.height * factor), round(frame.width * factor)
                    shown = scale(
                        frame, width, height, "rgb24", interpolation=interpolation, threads=1
                    ).to_ndarray()
                pictures.append(shown)
            if len(pictures) == WINDOW["frames"]:
                break
        file.seek(int(start / audio.time_base), stream=audio)
        resampler, sound, count = av.AudioResampler("fltp", "mono", WINDOW["sample_rate"]), [], 0
        for frame in file.decode(audio):
            for block in resampler.resample(frame):
                sound.append(block.to_ndarray())
                count += block.samples
            if count >= WINDOW["samples"]:
                break
    return np.stack(pictures), np.concatenate(sound, 1)


def alternately(functions, places, repeats):
    """Windows a second of each function, the best time of `repeats` for every place summed.

    All in turn at each place, so that what else the machine does falls on all of them; places at
    which one fails are left out, and their number is returned too.
    """
    best = {name: np.full(len(places), np.inf) for name in functions}
    fine = np.ones(len(places), bool)
    for _ in range(repeats):
        for k, place in enumerate(places):
            for name, function in functions.items():
                begin = time.perf_counter()
                try:
                    function(*place)
                except (av.FFmpegError, TypeError, ValueError):  # no rate, no frames
                    fine[k] = False
                best[name][k] = min(best[name][k], time.perf_counter() - begin)
    return {name: fine.sum() / times[fine].sum() for name, times in best.items()}, int(
        (~fine).sum()
    )


def rate(batches, size, seconds):
    """Windows a second of an iterator of batches, the best of three stretches after a first."""
    next(batches)
    best = 0.0
    for _ in range(3):
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds / 3 or not count:
            next(batches)
            count += size
        best = max(best, count / (time.perf_counter() - begin))
    return best


def loader(dataset, batch, workers, device=None):
    """Batches as training gets them, on the device if one is named."""
    loaded = iter(
        DataLoader(
            Draws(dataset),
            batch_sampler=EndlessBatches(len(dataset), micro_batch=batch),
            collate_fn=collate,
            num_workers=workers,
            pin_memory=device is not None,
        )
    )
    for each in loaded:
        if device is not None:
            each = {k: each[k].to(device, non_blocking=True) for k in ("video", "audio")}
            torch.cuda.synchronize()
        yield each


def read_rate(folder):
    """Bytes a second of the kept arrays read from their beginning, out of memory beforehand."""
    total, seconds = 0, 0.0
    for path in folder.glob("windows-*/*.npy"):
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begin, buffer = time.perf_counter(), bytearray(2**24)
            while count := file.readinto(buffer):
                total += count
            seconds += time.perf_counter() - begin
    return total / seconds / 1e9


def some(root, folder, count):
    """A folder with links to the first `count` files of another, or to clips made here."""
    folder.mkdir()
    if root is None:
        rng = np.random.default_rng(0)
        for k in range(min(count, 6)):
            video = rng.integers(0, 256, (3, 12, 9, 16), np.uint8).repeat(16, 2).repeat(16, 3)
            video = np.roll(video[:, [0]], 1, 3) // 2 + video.repeat(10, 1) // 2
            sound = 0.3 * np.sin(np.arange(5 * 22050) * (0.02 + 0.01 * k))[None]
            write_mp4(folder / f"{k}.mp4", video, sound, fps=24, sample_rate=22050)
        return folder
    usable = [
        entry.path
        for entry in build_index(root).entries
        if not entry.problem(("video", "audio"), WINDOW["frames"] / WINDOW["fps"], WINDOW["fps"])
    ]
    for path in usable[:: max(1, len(usable) // count)][:count]:
        (folder / path.replace("/", "_")).symlink_to(Path(root, path).absolute())
    return folder


def places_in(folder, count):
    """(path, start) of windows anywhere in the files, as training draws them."""
    rng = np.random.default_rng(0)
    entries, seconds = build_index(folder).entries, WINDOW["frames"] / WINDOW["fps"]
    places = []
    for k in range(count):
        entry = entries[k % len(entries)]
        start, end = entry.info.span(("video", "audio"))
        room = max(0.0, end - start - seconds - 0.5 / WINDOW["fps"])
        places.append((folder / entry.path, start + rng.random() * room))
    return places


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, help="a folder of clips")
    parser.add_argument("--files", type=int, default=64, help="of the folder, evenly chosen")
    parser.add_argument("--windows", type=int, default=64, help="decoded by each function")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="that each loader runs")
    options(parser)
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    report = Report("data", vars(args))
    with tempfile.TemporaryDirectory() as kept:
        measure(report, args, some(args.root, Path(kept, "clips"), args.files), Path(kept, "cache"))
    report.finish(args)


def measure(report, args, folder, cache):
    size = args.size
    settings = WINDOW | {"size": (size, size), "fit": "crop"}
    exact = exact_bicubic()
    functions = {
        "plain loop": lambda path, start: plain(path, start, size, exact),
        "plain loop, bilinear": lambda path, start: plain(path, start, size, None),
        "read_window": lambda path, start: read_window(path, start, **settings),
    }
    speeds, failed = alternately(functions, places_in(folder, args.windows), args.repeats)
    if failed:
        print(f"{failed} windows left out: a plain loop cannot read them")

    def row(what, speed, workers=None, beside=None, seconds=None, megabytes=None):
        ratio = None if beside is None else speed / beside
        words = {"what": what, "workers": "-" if workers is None else str(workers)}
        figures = {"windows_per_s": speed, "ratio": ratio, "seconds": seconds, "mb": megabytes}
        report.add(words | {k: None if v is None else float(v) for k, v in figures.items()})

    for name, speed in speeds.items():
        row(name, speed, beside=speeds["plain loop"])

    options = {**WINDOW, "size": (size, size), "split": "all", "cache": cache}
    decoding = Clips(folder, **options)
    begin = time.perf_counter()
    keeping = Clips(folder, **options, keep=True)
    seconds = time.perf_counter() - begin
    files = list(cache.glob("windows-*/*.npy"))
    stored = sum(file.stat().st_size for file in files) / 1e6
    row("keeping windows", len(keeping) / seconds, seconds=seconds, megabytes=stored)
    report.limit(
        {
            "copy_gb_per_s": copy_rate(torch.device("cpu")),
            "file_read_gb_per_s": read_rate(cache),
            "mb_per_window": stored / len(keeping),
        }
    )
    for workers in args.workers:
        before = rate(loader(decoding, args.batch, workers), args.batch, args.seconds)
        row("loader, decoding", before, workers)
        after = rate(loader(keeping, args.batch, workers), args.batch, args.seconds)
        row("loader, kept windows", after, workers, beside=before)
        if torch.cuda.is_available():
            moved = loader(keeping, args.batch, workers, torch.device("cuda"))
            row("loader, kept windows, to GPU", rate(moved, args.batch, args.seconds), workers)
    for name, toy in (("toy, defaults", Toy()), ("toy, quickstart", Toy(**QUICKSTART))):
        row(name, rate(loader(toy, args.batch, 0), args.batch, args.seconds), 0)


if __name__ == "__main__":
    main()

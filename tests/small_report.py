"""A small report of an evaluation, with each thing that one may hold, and its players."""

from io import BytesIO

import numpy as np

from avdiffusion import io
from avdiffusion.gallery import Entry
from avdiffusion.strip import strip

FPS, RATE = 10, 8000
LAGS = [k / FPS for k in range(-5, 6)]
CURVE = [0.01, 0.02, 0.0, 0.05, 0.14, 0.21, 0.24, 0.13, 0.03, -0.02, None]


def figure(key, value, **fields):
    return {"key": key, "label": key.upper(), "value": value, "n": 80, **fields}


def small_report() -> dict:
    time = [k / FPS for k in range(1, 15)]
    curves = {"time": time, "motion": [0.1] * 4 + [1.0] + [0.2] * 9, "onset": [0.0] * 6 + [2.0] * 8}
    lag_curve = {"lags": LAGS, "curve": CURVE, "curve_low": [-0.03] * 11, "curve_high": [0.03] * 11}
    distances = [
        figure(
            *("kvd", 11.52),
            **{"better": "lower", "low": 9.81, "high": 13.4, "n_reference": 96, "floor": 0.62},
            **{"floor_n": 48, "extractor": "I3D (weights 9a1f)", "notes": ["no bias", "of 3"]},
        ),
        figure("fad", 2.913, better="lower", n_reference=96, floor=0.91, floor_n=48),
    ]
    synchrony = [
        figure(
            *("avcorr", 0.214),
            **{"better": "higher", "low": 0.18, "high": 0.25, "chance": 0.01, "ceiling": 0.31},
            **{"power": 0.52, "notes": ["Pearson"], "details": lag_curve},
        ),
        figure("offset", 62.0, unit="ms", power=0.93, details={"clips": [1.0] * 80, **lag_curve}),
        figure("silent", None, n=0, notes=["no clip has sound"]),
    ]
    read = [["fps", FPS], ["size", "32 × 32"], ["resize filter", "area"], ["sample rate", RATE]]
    return {
        "title": "Small",
        "created": "2026-11-30 14:02",
        "version": "0.1.0",
        "command": "python evaluate.py samples=a reference=b",
        "seconds": 12.3,
        "protocol": {"name": "default", "lines": read},
        "sets": {
            "samples": {
                **{"name": "ours", "path": "runs/ours", "count": 80, "hash": "8f14e45fceea167a"},
                "lines": [["codec read", "arrays"]],
            },
            "reference": {
                **{"path": "data/held_out", "count": 96, "hash": "c9f0f895fb98ab91"},
                "lines": [["codec read", "vp9 + opus"]],
            },
        },
        "main": ["kvd", "avcorr", "absent"],
        "groups": [
            {"title": "Distances", "figures": distances},
            {"title": "Synchrony", "figures": synchrony},
            {"title": "Nothing", "figures": []},
        ],
        "warnings": ["80 clips are few"],
        "pairs": [
            {"sample": "000002", "neighbour": "b", "of": "i3d", "distance": 1.5, "ratio": 0.41},
            {"sample": "000000", "neighbour": "a", "of": "i3d", "distance": 2.5, "ratio": 0.97},
            {"sample": "000002", "neighbour": "b", "of": "yamnet", "distance": 9.0, "ratio": 1.01},
        ],
        "clips": [
            {
                "name": f"{i:06d}",
                "scores": {"avcorr": 0.1 * i, "silent": None},
                "curves": {**curves, "lag": None if i == 1 else 0.2, "seconds": 1.6},
            }
            for i in range(4)
        ],
    }


def small_entries() -> dict[str, Entry]:
    """Three samples and two training clips."""
    entries = {}
    for k, name in enumerate(["000000", "000001", "000002", "/train/a", "/train/b"]):
        video, audio = np.full((3, 16, 32, 32), 40 * k, np.uint8), np.zeros((1, 12800), np.float32)
        video[:, 8] = 255
        audio[:, 6400:7200] = 0.8 * np.sin(2 * np.pi * 900 * np.arange(800) / RATE)
        clip = io.mp4_bytes(video, audio, fps=FPS, sample_rate=RATE)
        picture = BytesIO()
        strip(video, audio, fps=FPS, sample_rate=RATE).save(picture, "PNG")
        entries[name] = Entry(name.removeprefix("/train/"), "", clip, picture.getvalue())
    return entries

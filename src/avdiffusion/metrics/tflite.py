"""Networks that hear, as TensorFlow Lite files: YAMNet and BirdNET, the features of FAD and KAD.

Audio is float [B, C, L] in [-1, 1], of which the mean of the channels is heard.
"""

import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from avdiffusion import weights as files
from avdiffusion.metrics.metric import Array, Clips, Found, Rates

log = logging.getLogger(__name__)


@cache
def interpreter(weights: str, threads: int) -> Any:
    """The runtime with a file opened, once in a process; it keeps what inner tensors held."""
    path = files.find(weights)
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        raise ValueError(
            f"{path.name} runs in the package ai-edge-litert, which is not installed. "
            'Run: pip install "avdiffusion[metrics]", or pip install ai-edge-litert'
        ) from None
    if weights in files.KNOWN and files.KNOWN[weights].note:
        log.warning(files.KNOWN[weights].note)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*experimental_preserve_all_tensors")
        opened = Interpreter(str(path), num_threads=threads, experimental_preserve_all_tensors=True)
    opened.allocate_tensors()
    return opened


def resampled(audio: Array, rate: float, to: int) -> Tensor:
    """Mono at another rate, float32 [B, L'], by a windowed sinc."""
    mono = torch.as_tensor(audio).float().mean(dim=1)
    if rate == to:
        return mono
    try:
        from torchaudio.functional import resample
    except (ImportError, OSError):
        raise ValueError(
            f"sound at {rate:g} Hz is heard at {to} Hz, which takes the package torchaudio, and "
            f"that cannot be imported: install it, or set form.sample_rate={to}"
        ) from None

    return resample(mono, round(rate), to)


def windows(audio: Tensor, length: int, hop: int) -> Tensor:
    """Pieces of `length` samples, [B, N, length], from [B, L].

    They are at most `hop` apart and evenly spread from the beginning to the very end, so that none
    holds silence that was not there; only a clip shorter than one is followed by zeros.
    """
    rest = audio.shape[1] - length
    if rest <= 0:
        return torch.nn.functional.pad(audio, (0, -rest))[:, None]
    count = 1 + math.ceil(rest / hop)
    starts = [round(rest * k / (count - 1)) for k in range(count)]
    return torch.stack([audio[:, start : start + length] for start in starts], dim=1)


@dataclass(kw_only=True)
class _Listener:
    """Embeddings [B, 1024], the mean over a clip's windows."""

    weights: str
    threads: int = 1

    title: ClassVar[str]
    rate: ClassVar[int]
    length: ClassVar[int]  # samples of a window
    hop: ClassVar[int]  # samples between windows
    inner: ClassVar[str]  # what the embedding is called
    needs: ClassVar = ("audio",)
    fields: ClassVar = ("embedding",)
    paired: ClassVar = False

    @property
    def name(self) -> str:
        seconds = f"{self.length / self.rate:g} s, at most {self.hop / self.rate:g} s apart"
        return (
            f"{self.title} embeddings ({files.label(self.weights)}), mono {self.rate} Hz, "
            f"mean over windows of {seconds}, shorter clips followed by zeros"
        )

    def __call__(self, clips: Clips, rates: Rates) -> Found:
        runtime = interpreter(self.weights, self.threads)
        index = self._inner(runtime)
        return {"embedding": self._means(runtime, index, clips, rates)}

    def _means(self, runtime, index, clips, rates):
        """One tensor's mean over the windows of each clip."""
        audio = torch.as_tensor(clips["audio"])
        if audio.ndim != 3 or not audio.is_floating_point():
            raise ValueError(
                f"{self.title} takes float audio [B, C, L], not {audio.dtype} {list(audio.shape)}"
            )
        mono = resampled(audio, rates["audio"], self.rate)
        found = [
            np.mean(list(self._heard(runtime, index, clip)), axis=0)
            for clip in windows(mono, self.length, self.hop).numpy()
        ]
        return np.stack(found)

    def _heard(self, runtime, index, clip) -> Iterator[np.ndarray]:
        entrance = runtime.get_input_details()[0]
        for window in clip:
            runtime.set_tensor(entrance["index"], window.reshape(entrance["shape"]))
            runtime.invoke()
            yield runtime.get_tensor(index)[0]

    def _inner(self, runtime):
        for tensor in runtime.get_tensor_details():
            if self.inner in tensor["name"] and tuple(tensor["shape"]) == (1, 1024):
                return tensor["index"]
        raise ValueError(f"{files.find(self.weights)} is not {self.title}: it has no {self.inner}")


@dataclass(kw_only=True)
class YAMNet(_Listener):
    """YAMNet (Plakal and Ellis 2020), 521 classes of AudioSet, at 16 kHz."""

    weights: str = "yamnet"

    title: ClassVar = "YAMNet"
    rate: ClassVar = 16_000
    length: ClassVar = 15_600
    hop: ClassVar = 7_680
    inner: ClassVar = "global_average_pooling2d"

    def scores(self, clips: Clips, rates: Rates) -> np.ndarray:
        """How much each class is heard, 0 to 1: [B, 521], the mean over windows."""
        runtime = interpreter(self.weights, self.threads)
        return self._means(runtime, runtime.get_output_details()[0]["index"], clips, rates)


@dataclass(kw_only=True)
class BirdNET(_Listener):
    """BirdNET 2.4 (Kahl et al. 2021), sounds of nature at 48 kHz; for non-commercial use only."""

    weights: str = "birdnet"

    title: ClassVar = "BirdNET"
    rate: ClassVar = 48_000
    length: ClassVar = 144_000
    hop: ClassVar = 144_000
    inner: ClassVar = "GLOBAL_AVG_POOL"

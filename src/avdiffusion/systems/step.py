"""How sampling calls a network: in which precision, compiled, captured, reusing deep features."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from avdiffusion import memory
from avdiffusion.compiled import MODES, compiled

PRECISIONS = ("32-true", "bf16-mixed")
FRAMES = 64  # more keep no device busier

Call = Callable[..., Any]


@dataclass(kw_only=True)
class Step:
    """Of a network, a function that does what the network does, faster.

    `precision`: "bf16-mixed" runs it under automatic mixed precision, and weights that the network
    names by `rounded` are rounded for every function, not at every call of it. `compile`: true or a
    mode of torch.compile, for the shapes it meets. `capture` (null: on a GPU) replays CUDA graphs.

    With an `interval` above 1 only every so many calls compute all of the network. At the others
    the encoder's first `depth` stages and the decoder's that belong to them get what the last
    whole call had computed below (DeepCache, Ma et al. 2023, there 1:N). The count begins anew
    with every function, so that a sample never depends on another.

    A network that sees every frame by itself (`framewise`) is given `frames_at_once`: by default as
    many as half of the memory holds that is free at the first call, at most FRAMES.
    """

    precision: str = "32-true"
    compile: bool | str = False
    capture: bool | None = None
    interval: int = 1
    depth: int = 2
    frames_at_once: int | None = None
    made: dict[nn.Module, Call] = field(default_factory=dict, init=False, repr=False)
    halves: dict[nn.Module, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)
    fitting: dict[tuple, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision} is not one of {', '.join(PRECISIONS)}")
        if isinstance(self.compile, str) and self.compile not in MODES:
            raise ValueError(f"compile={self.compile} is not true, false or {', '.join(MODES)}")
        if self.capture and MODES.get(self.compile):
            raise ValueError(f"compile={self.compile} captures by itself: leave out capture=true")
        if self.frames_at_once is not None and self.frames_at_once < 1:
            raise ValueError(f"frames_at_once={self.frames_at_once} is below 1")
        if self.interval < 1 or self.depth < 0:
            raise ValueError(
                f"reuse.interval={self.interval}, reuse.depth={self.depth}: 1 or more, 0 or more"
            )

    def __call__(self, net: nn.Module) -> Call:
        if self.interval > 1:
            deepest = getattr(net, "deepest", None)
            if deepest is None:
                raise ValueError(
                    f"{type(net).__name__} keeps no deep features: leave out reuse.interval"
                )
            if self.depth > deepest:
                raise ValueError(f"reuse.depth={self.depth} is above this network's {deepest}")
        if net not in self.made:
            self.halves[net] = self._halves(net)
            self.made[net] = self._make(net)
        for name, half in self.halves[net].items():  # in place, where a graph reads them
            half.copy_(net.get_parameter(name).detach())
        call = self.made[net] if self.interval == 1 else self._reusing(self.made[net])
        return partial(self._by_frames, net, call) if getattr(net, "framewise", False) else call

    def settings(self) -> dict[str, object]:
        """What a sample depends on; a graph replays the kernels that it was captured from."""
        chosen = {} if self.precision == PRECISIONS[0] else {"precision": self.precision}
        if self.compile:
            chosen["compile"] = self.compile
        if self.interval > 1:
            chosen["reuse"] = {"interval": self.interval, "depth": self.depth}
        return chosen

    def _halves(self, net: nn.Module) -> dict[str, Tensor]:
        """Room for weights in bfloat16; a compiler makes them where it needs them."""
        if self.precision == PRECISIONS[0] or self.compile or not hasattr(net, "rounded"):
            return {}
        names = net.rounded()
        return {n: torch.empty_like(net.get_parameter(n), dtype=torch.bfloat16) for n in names}

    def _make(self, net: nn.Module) -> Call:
        kind = next(net.parameters()).device.type
        if self.capture and kind != "cuda":
            raise ValueError(f"capture=true makes CUDA graphs, and the model is on {kind}")
        run, halves = compiled(net, self.compile, kind) if self.compile else net, self.halves[net]
        if halves:
            run = partial(_with, net, halves)
        mixed, own_graphs = self.precision == "bf16-mixed", MODES.get(self.compile, False)

        def call(*args: Any, **kwargs: Any) -> Any:
            # Weights kept in bfloat16 would be of one capture and gone at its replay.
            with torch.autocast(kind, torch.bfloat16, enabled=mixed, cache_enabled=False):
                found = run(*args, **kwargs)
            return tree_map(torch.clone, found) if own_graphs else found

        capture = kind == "cuda" and not own_graphs if self.capture is None else self.capture
        return Captured(call, cuda_graph) if capture else call

    def _by_frames(
        self, net: nn.Module, call: Call, x: Tensor, *, time: Tensor, **cond: Tensor
    ) -> Tensor:
        """The network's answer for [B, C, T, ...], of so many frames at a time."""
        case = net, x.shape[3:]
        if self.frames_at_once is None and case not in self.fitting:
            room = memory.room(net.frame_bytes(*x.shape[3:]), x.device)
            self.fitting[case] = max(1, min(room, FRAMES))
        size = self.frames_at_once or self.fitting[case]
        batch = {name: v.transpose(1, 2).flatten(0, 1) for name, v in cond.items()}
        batch["time"] = time.repeat_interleave(x.shape[2])
        rows = x.transpose(1, 2).flatten(0, 1)
        made = [
            call(rows[part], **{name: v[part] for name, v in batch.items()})
            for part in _slices(len(rows), size)
        ]
        return torch.cat(made).unflatten(0, (len(x), -1)).transpose(1, 2)

    def _reusing(self, call: Call) -> Call:
        count, kept = 0, ()

        def reusing(*x: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
            nonlocal count, kept
            whole, count = count % self.interval == 0, count + 1
            if not whole:
                return call(*x, **kwargs, depth=self.depth, kept=kept)
            found = call(*x, **kwargs, depth=self.depth)
            out, kept = found[: len(x)], found[len(x) :]
            return out

        return reusing


def _slices(count: int, size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, count, size)]


def _with(net: nn.Module, weights: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return functional_call(net, weights, args, kwargs)


class Captured:
    """A function of tensors, recorded at the first call of each kind and replayed at later ones.

    Calls are of one kind if tensors agree in shape, type and device and all else is equal. A
    recording reads its arguments in tensors of its own, and its results are copied before another
    replay may overwrite them. Where a gradient may be asked for, nothing is recorded.

    `record(function)` gives what does the function's work again, and the results it works on.
    """

    def __init__(self, function: Call, record: Callable[[Call], tuple[Call, Any]]):
        self.function, self.record = function, record
        self.recordings = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return self.function(*args, **kwargs)
        given, form = tree_flatten((args, kwargs))
        kind = (form, *map(_kind, given))
        if kind not in self.recordings:
            own = [v.clone() if isinstance(v, Tensor) else v for v in given]
            args, kwargs = tree_unflatten(own, form)
            self.recordings[kind] = own, *self.record(lambda: self.function(*args, **kwargs))
        own, replay, results = self.recordings[kind]
        for mine, value in zip(own, given, strict=True):
            if isinstance(value, Tensor):
                mine.copy_(value)
        replay()
        return tree_map(torch.clone, results)


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    return value


def cuda_graph(function: Call) -> tuple[Call, Any]:
    """The function's work as a CUDA graph, and the tensors in which that leaves its results."""
    results = function()  # says what is wrong with it in its own words
    with torch.cuda.device(next(v for v in tree_flatten(results)[0]).device):
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(2):  # libraries choose their kernels and take their memory
                function()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                results = function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a copy from the CPU is refused before the driver sees it
            raise ValueError(
                "the network waits for its device or copies from the CPU while it runs, and cannot "
                "be captured: use capture=false"
            ) from error
    return graph.replay, results

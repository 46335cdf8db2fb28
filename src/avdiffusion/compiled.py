"""Compiling a network with torch.compile: where it stands, and what a machine needs for it."""

import os
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

# of torch.compile, and whether it makes CUDA graphs of its own
MODES = {"default": False, "max-autotune-no-cudagraphs": False}
MODES |= {"reduce-overhead": True, "max-autotune": True}


def compile_in_place(net: nn.Module, how: bool | str, device: str) -> None:
    """Lets torch.compile make the network's kernels, for the shapes it meets, at its first call.

    `how`: true or a mode of torch.compile. Keys of the state stay as they are. A copy that was made
    before, such as an average, is not compiled. Raises ValueError where kernels cannot be made.
    """
    if how:
        net.compile(dynamic=False, mode=_mode(how, device))


def compiled(net: nn.Module, how: bool | str, device: str) -> Callable[..., Any]:
    """The same as a function, beside the network."""
    return torch.compile(net, dynamic=False, mode=_mode(how, device))


def _mode(how: bool | str, device: str) -> str | None:
    if isinstance(how, str) and how not in MODES:
        raise ValueError(f"compile={how} is not true, false or {', '.join(MODES)}")
    if lacking := missing(device):
        raise ValueError(f"compile={str(how).lower()} needs {lacking}, or compile=false")
    return how if isinstance(how, str) else None


def missing(device: str) -> str | None:
    """What a machine lacks to make kernels for a kind of device, and how to get it."""
    if device == "cuda" and find_spec("triton") is None:
        return "the package triton (pip install triton)"
    default = "cl" if sys.platform == "win32" else "clang++" if sys.platform == "darwin" else "g++"
    compiler = os.environ.get("CXX", default)
    if shutil.which(compiler.split()[0]) is None:
        return f"a C++ compiler, and there is no {compiler}: install g++ or clang++ (CXX names it)"
    return None

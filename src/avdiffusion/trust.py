"""What a stored config may build: our own parts and torch's, nothing that acts on the machine."""

import importlib
from collections.abc import Iterator
from functools import reduce
from types import FunctionType
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

OURS = ("avdiffusion.diffusion", "avdiffusion.nn", "avdiffusion.samplers", "avdiffusion.systems")
LIBRARIES = ("torch.nn", "torch.optim")
NAMES = ("ema_pytorch.EMA",)  # its siblings write folders
LIMIT = 10_000  # entries; a config that holds itself has no end


def objections(config: dict) -> Iterator[str]:
    """Why building what this plain config describes could do more than build a model."""
    for count, (place, node) in enumerate(_entries(config)):
        if count >= LIMIT:
            yield f"it has more than {LIMIT} entries"
            return
        if type(node) is dict:
            if any(type(key) is not str for key in node):
                yield f"{place} has keys that are no text"
            if "_target_" in node and not trusted(node["_target_"]):
                yield f"{place} would call {node['_target_']!r}"
        elif type(node) is str:
            if "${" in node:
                yield f"{place} holds an interpolation, {node!r}"
        elif type(node) not in (list, tuple, bool, int, float, type(None)):
            yield f"{place} holds a {type(node).__name__}"


def _entries(config: dict) -> Iterator[tuple[str, Any]]:
    rest = [("config", config)]
    while rest:
        place, node = rest.pop()
        yield place, node
        if isinstance(node, dict):
            rest += [(f"{place}.{key}", value) for key, value in node.items()]
        elif isinstance(node, list | tuple):
            rest += [(f"{place}.{number}", value) for number, value in enumerate(node)]


def trusted(target: object) -> bool:
    """Whether a name is that of a public class or function of ours, or of a part of torch's.

    It has to be the name of its own module, by which Hydra finds the same: what a module imports
    (`avdiffusion.nn.blocks.torch.load`) is not its own. Of torch, only modules, optimisers and
    learning-rate schedules are parts.
    """
    if type(target) is not str or target.startswith("_") or "._" in target:
        return False
    if target in NAMES:
        return True
    module, _, name = target.rpartition(".")
    if not _within(module, OURS + LIBRARIES):
        return False
    try:
        found = getattr(importlib.import_module(module), name)
        root, *parts = target.split(".")
        if reduce(getattr, parts, importlib.import_module(root)) is not found:
            return False
    except (ImportError, AttributeError, ValueError):
        return False
    home = getattr(found, "__module__", None)
    if _within(module, OURS):
        return home == module and isinstance(found, type | FunctionType)
    parts = (nn.Module, Optimizer, LRScheduler)
    return isinstance(found, type) and issubclass(found, parts) and _within(home, LIBRARIES)


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return module.startswith(tuple(f"{package}." for package in packages)) or module in packages

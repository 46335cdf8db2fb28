"""Work that several processes share, each doing what is its own and all getting everything."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from torch import distributed

Part = TypeVar("Part")


def share(index: Iterable[int], size: int, rank: int, world: int) -> list[int]:
    """Those that one of `world` processes makes: such as make up whole batches of `size`."""
    return [i for i in index if i // size % world == rank]


def gathered(parts: Iterator[Part], world: int) -> Iterator[Part]:
    """The parts of all `world` processes, in turns; one may have more of them than another."""
    if world == 1:
        yield from parts
        return
    while True:
        turn = [None] * world
        distributed.all_gather_object(turn, next(parts, None))
        if all(part is None for part in turn):
            return
        yield from (part for part in turn if part is not None)

"""The memory of a network's passes, and what to compute a second time so that it suffices."""

import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Plan:
    """The stages of a network that are computed again in the backward pass, by its inputs.

    `checkpoint`: whether all of them are, or how many GiB may be kept, beyond which some are.
    """

    def __init__(self, checkpoint: bool | float):
        self.checkpoint = checkpoint
        self.known: dict[tuple, set[nn.Module]] = {}

    def __call__(
        self, stages: Iterable[nn.Module], run: Callable[..., object], *inputs: Tensor
    ) -> set[nn.Module]:
        """Those of a forward pass `run(*inputs)` through all `stages`."""
        if not torch.is_grad_enabled():
            return set()
        if isinstance(self.checkpoint, bool) or inputs[0].is_meta:
            return set(stages) if self.checkpoint is True else set()
        mixed = torch.is_autocast_enabled(inputs[0].device.type)
        case = (mixed, *(x.shape for x in inputs))
        if case not in self.known:
            self.known[case] = set()

            def dry() -> object:
                blank = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
                return run(*blank)

            self.known[case] = chosen(list(stages), dry, self.checkpoint * 2**30)
        return self.known[case]


def chosen(stages: Sequence[nn.Module], run: Callable[[], object], budget: float) -> set[nn.Module]:
    """The stages to recompute so that activations take no more than `budget` bytes, if that can be.

    They are those that free most memory for each operation done again. `run` is a forward pass
    through all stages; it is gone through with tensors that have shapes but no values.
    """
    total, freed = survey(stages, run)
    picked = set()
    for stage in sorted(freed, key=lambda stage: -freed[stage][0] / max(1, freed[stage][1])):
        if total <= budget:
            break
        picked.add(stage)
        total -= freed[stage][0]
    return picked


def survey(
    stages: Sequence[nn.Module], run: Callable[[], object]
) -> tuple[int, dict[nn.Module, tuple[int, int]]]:
    """Bytes a forward pass keeps for the gradient; of each stage (bytes of its own, operations).

    Of its own is what is gone if the stage keeps its inputs only.
    """
    kept: dict[int, int] = {}  # bytes by storage
    freed, began, handles = {}, {}, []

    def keep(x: Tensor) -> Tensor:
        if not isinstance(x if x._base is None else x._base, nn.Parameter):
            kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as operations:

        def before(stage, inputs):
            began[stage] = set(kept), operations.get_total_flops()
            for x in inputs:
                if isinstance(x, Tensor):
                    began[stage][0].add(x.untyped_storage()._cdata)

        def after(stage, inputs, outputs):
            old, flops = began[stage]
            new = sum(size for storage, size in kept.items() if storage not in old)
            freed[stage] = new, operations.get_total_flops() - flops

        try:
            for stage in stages:
                handles += [
                    stage.register_forward_pre_hook(before),
                    stage.register_forward_hook(after),
                ]
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                _held = run()  # so that no storage is used twice
                total = sum(kept.values())
        finally:
            for handle in handles:
                handle.remove()
    return total, freed


class Held(TorchDispatchMode):
    """Context that counts the bytes of what is made in it; `most`: held at one time."""

    def __init__(self):
        super().__init__()
        self.bytes = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        made = operation(*arguments, **(options or {}))
        for x in tree_leaves(made):
            if isinstance(x, Tensor):
                self.hold(x.untyped_storage())
        self.most = max(self.most, self.bytes)
        return made

    def hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.bytes += size
            weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


def most_held(run: Callable[[], object]) -> int:
    """The most bytes that tensors made by `run` take at once; none of them gets values."""
    with FakeTensorMode(allow_non_fake_inputs=True), Held() as held:
        run()
    return held.most

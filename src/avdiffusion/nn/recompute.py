"""What of a network to compute a second time in the backward pass, so that its memory suffices."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode


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

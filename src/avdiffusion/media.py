"""Several modalities as one value."""

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor


class Media(dict[str, Tensor]):
    """Tensors of several modalities with a common batch axis; arithmetic and `torch.*` act on each.

    The other operand may be Media with the same keys, a tensor or a number. Code written for a
    tensor (every sampler) therefore runs on audio and video together, unchanged.
    """

    def map(self, fn: Callable[..., Any], *others: Any) -> "Media":
        """`fn(entry, *other entries)` for every key; an other that is no Media is handed over."""
        for other in others:
            if isinstance(other, Media) and other.keys() != self.keys():
                raise ValueError(f"Media with {list(self)} meets Media with {list(other)}")

        def entry(value: Any, key: str) -> Any:
            return value[key] if isinstance(value, Media) else value

        return Media({k: fn(v, *(entry(o, k) for o in others)) for k, v in self.items()})

    def __add__(self, other: Any) -> "Media":
        return self.map(operator.add, other)

    def __sub__(self, other: Any) -> "Media":
        return self.map(operator.sub, other)

    def __rsub__(self, other: Any) -> "Media":
        return self.map(lambda a, b: b - a, other)

    def __mul__(self, other: Any) -> "Media":
        return self.map(operator.mul, other)

    def __truediv__(self, other: Any) -> "Media":
        return self.map(operator.truediv, other)

    def __rtruediv__(self, other: Any) -> "Media":
        return self.map(lambda a, b: b / a, other)

    def __neg__(self) -> "Media":
        return self.map(operator.neg)

    __radd__ = __add__
    __rmul__ = __mul__

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        values = (*args, *(kwargs or {}).values())
        first = next((value for value in values if isinstance(value, Media)), None)
        if first is None:
            raise TypeError(f"{func.__name__} takes Media one by one, not in a list: use `map`")

        def call(_: Tensor, *values: Any) -> Any:
            named = zip(kwargs or {}, values[len(args) :], strict=True)
            return func(*values[: len(args)], **dict(named))

        return first.map(call, *values)

    def to(self, *args: Any, **kwargs: Any) -> "Media":
        """`Tensor.to` on every entry."""
        return self.map(lambda v: v.to(*args, **kwargs))

    def __reduce__(self):
        return Media, (dict(self),)

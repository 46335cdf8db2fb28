"""Times a sampler stops at: float64, decreasing from t_start to t_end, `steps` intervals."""

from collections.abc import Callable

import torch
from torch import Tensor

from avdiffusion.diffusion.path import Path


def _line(start: float | Tensor, end: float | Tensor, count: int) -> Tensor:
    return torch.linspace(float(start), float(end), count, dtype=torch.float64)


def trailing(path: Path, steps: int, start: float, end: float) -> Tensor:
    """Uniform in t, down to the data (Lin et al. 2024)."""
    return _line(start, end, steps + 1)


def leading(path: Path, steps: int, start: float, end: float) -> Tensor:
    """The "ddimN" of guided-diffusion: every (N / steps)-th step of the table from step 0 on."""
    total = _total(path)
    stride = next((s for s in range(1, total) if len(range(0, total, s)) == steps), None)
    if stride is None:
        raise ValueError(f"no integer stride takes {steps} of {total} steps; use grid=trailing")
    return _table(list(range(0, total, stride)), total, start, end)


def sections(path: Path, steps: int, start: float, end: float) -> Tensor:
    """guided-diffusion's respacing to "steps": evenly spread over the table, both ends included."""
    total = _total(path)
    if not 1 <= steps <= total:
        raise ValueError(f"steps={steps} is not within 1 and the table's {total}")
    stride = (total - 1) / (steps - 1) if steps > 1 else 1.0
    # Accumulated and rounded half to even, as the published table was.
    places, place = [], 0.0
    for _ in range(steps):
        places.append(round(place))
        place += stride
    return _table(places, total, start, end)


def _total(path: Path) -> int:
    if path.t_min <= 0:
        raise ValueError(f"{type(path).__name__} is no table of steps: use grid=trailing")
    return round(1 / path.t_min)


def _table(places: list[int], total: int, start: float, end: float) -> Tensor:
    """The steps between start and end; the whole table begins at its own highest step."""
    times = [(i + 1) / total for i in reversed(places)]
    first = [start] if start < 1 else [t for t in times if t == start]
    times = [*first, *(t for t in times if end < t < start), end]
    if len(times) < 2:
        raise ValueError(f"none of the table's {len(places)} steps lies above t_end={end}")
    return torch.tensor(times, dtype=torch.float64)


def time_uniform(path: Path, steps: int, start: float, end: float) -> Tensor:
    """Uniform in t, to t_min or end (Lu et al. 2022)."""
    return _line(start, _end(path, start, end), steps + 1)


def quadratic(path: Path, steps: int, start: float, end: float) -> Tensor:
    """Uniform in the square root of t, to t_min or end (Song et al. 2021)."""
    end = _end(path, start, end)
    times = _line(start**0.5, end**0.5, steps + 1) ** 2
    times[0], times[-1] = start, end
    return times


def log_snr(path: Path, steps: int, start: float, end: float) -> Tensor:
    """Uniform in log(alpha / sigma) (Lu et al. 2022), from t_max or just below to t_min or end."""
    end = _end(path, start, end)
    times = path.time(_line(*_lam(path, start, end), steps + 1))
    times[0], times[-1] = start, end
    return times


def karras(path: Path, steps: int, start: float, end: float) -> Tensor:
    """Karras et al. 2022, equation 5, with rho = 7: uniform in the 7th root of sigma / alpha.

    Where the data end lies below t_min, the last of the steps leads there from t_min.
    """
    if end < _end(path, start, end) and steps > 1:
        last = torch.tensor([end], dtype=torch.float64)
        return torch.cat([karras(path, steps - 1, start, path.t_min), last])
    high, low = (-_lam(path, start, end) / 7).exp()
    times = path.time(-7 * _line(high, low, steps + 1).log())
    times[0], times[-1] = start, end
    return times


def _end(path: Path, start: float, end: float) -> float:
    """Where the noise ends that a network was trained on, or before."""
    end = max(end, path.t_min)
    if start <= end:
        raise ValueError(f"no times fall from t_start={start} to {end}")
    return end


def _lam(path: Path, start: float, end: float) -> Tensor:
    """log(alpha / sigma) at both, the first no lower than times next to each other can tell."""
    # A path whose data end vanishes at t = 1 has no finite lambda there, and just below it one so
    # low that times next to each other would be equal.
    ends = torch.tensor([start, end, path.t_max], dtype=torch.float64).clamp(max=path.t_max)
    high, low, floor = path.lam(ends)
    floor = floor.nan_to_num(neginf=-7.0)
    return torch.stack([high, low]).clamp(min=floor)


GRIDS: dict[str, Callable[[Path, int, float, float], Tensor]] = {
    "trailing": trailing,
    "leading": leading,
    "sections": sections,
    "time_uniform": time_uniform,
    "quadratic": quadratic,
    "log_snr": log_snr,
    "karras": karras,
}

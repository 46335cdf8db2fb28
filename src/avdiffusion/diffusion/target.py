"""What a network predicts: out = a x0 + b eps, whatever the path."""

from collections.abc import Callable

from torch import Tensor


def scale_in(alpha: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """Factor that gives x_t unit variance (Karras et al. 2022, table 1); 1 on VP paths."""
    return (alpha**2 * sigma_data**2 + sigma**2).rsqrt()


def edm_pair(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """EDM's preconditioned output (Karras et al. 2022, equation 7), for any alpha."""
    scale = scale_in(alpha, sigma, sigma_data)
    return sigma * scale / sigma_data, -alpha * sigma_data * scale


TARGETS: dict[str, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "eps": lambda alpha, sigma, _: (0 * alpha, 1 + 0 * sigma),
    "x0": lambda alpha, sigma, _: (1 + 0 * alpha, 0 * sigma),
    "v": lambda alpha, sigma, _: (-sigma, alpha),
    "flow": lambda alpha, sigma, _: (-1 + 0 * alpha, 1 + 0 * sigma),
    "edm": edm_pair,
}


def det(alpha: Tensor, sigma: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
    """Determinant of (x0, eps) -> (x_t, out); an error in `out` is sigma / det of it in x0."""
    return alpha * pair[1] - sigma * pair[0]

"""Small networks of sound with weights drawn from their names, and numbers that these compute."""

import math

import torch

from avdiffusion.published_audio import to_published

AUTOENCODER = {
    "channels": [16, 16, 16, 16, 32, 32, 32],
    "items": [1, 2, 1, 1, 1, 1, 1],
    "modulation": 32,
    "inject_depth": 4,
    "inject_channels": 4,
    "filters": 8,
}
ENCODER = {"channels": 16, "num_blocks": [1, 2], "out_channels": 4}
GENERATOR = {
    "audio_channels": 4,
    "channels": [16, 32, 32],
    "factors": [1, 2, 2],
    "items": [1, 1, 2],
    "attentions": [0, 0, 1],
    "cross_attentions": [1, 1, 1],
    "attention_heads": 2,
    "attention_features": 8,
    "context_width": 32,
    "modulation": 32,
}

# mean, deviation, first and last value of what the published code makes, in float64
NUMBERS = {
    "encoded": (0.0032386150, 0.0583295064, -0.0161848121, 0.0420072567),
    "denoised": (0.0001478223, 0.0152492668, 0.0057876560, -0.0255139663),
    "decoded in 3": (-0.0001453111, 0.4593648414, 0.1203117459, -0.6292171707),
    "scale 1": (0.0131767802, 0.7027022061, -0.0171456100, 0.5790888378),
    "scale 5": (0.0131777465, 0.7027059895, -0.0171425212, 0.5790731947),
    "scale 0": (0.0131765387, 0.7027012603, -0.0171463822, 0.5790927485),
    "made in 4 at scale 3": (0.0055903195, 0.0664407017, -0.0116180858, 0.0625890625),
}
LOSS = 0.9667657872  # of v at time 0.25


def wave(shape, a, b=0.0):
    """sin(a n + b) of the flat index n."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(a * steps + b).view(shape)


def drawn(*parts):
    """Weights under published names, by the place of each name among all."""
    with torch.no_grad():
        shapes = {key: value.shape for key, value in to_published(*parts).items()}
    found = {}
    for place, key in enumerate(sorted(shapes)):
        found[key] = 0.05 * wave(shapes[key], 0.7, 1.3 * place)
        if len(shapes[key]) == 1 and key.endswith(".weight"):
            found[key] += 1
    return found


# what the networks are given
SOUND, START = 0.3 * wave((1, 2, 8192), 0.05), wave((1, 2, 8192), 0.9, 0.2)
LATENT, OTHER_START = wave((1, 4, 16), 0.31), wave((1, 4, 16), 1.7)
NOISE, TEXT = wave((1, 4, 16), 2.3), wave((1, 16, 32), 0.11, 0.5)


def agree(found, name, *, rtol=1e-9, atol=6e-11):
    """With ten printed digits."""
    values = found.detach().double().flatten()
    numbers = torch.stack((values.mean(), values.std(), values[0], values[-1]))
    expected = torch.tensor(NUMBERS[name], dtype=torch.float64)
    torch.testing.assert_close(numbers, expected, rtol=rtol, atol=atol)

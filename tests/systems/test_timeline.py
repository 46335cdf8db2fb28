"""Windows fill any clip, whatever its rates, lengths and what is known of it."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_system import system
from torch import Tensor, nn

from avdiffusion.diffusion.diffusion import Diffusion, Prediction
from avdiffusion.diffusion.known import Replace
from avdiffusion.diffusion.path import RectifiedFlow
from avdiffusion.media import Media
from avdiffusion.systems.diffusion import DiffusionSystem
from avdiffusion.systems.timeline import Blank, Timeline, faded

RATES = (3, 5, 7, 8, 10, 12.5, 24000 / 1001, 25, 30000 / 1001)
SOUND = (16, 60, 441, 4000)


class Part(NamedTuple):
    values: dict[str, Tensor]
    mask: dict[str, Tensor]


def blank(fps, rate, window, frames, samples=None):
    """Nothing known of so many frames, for windows of `window`; and the windows."""
    sizes = {"video": window, "audio": round(window * rate / fps) if samples is None else samples}
    shapes = {"video": [2, sizes["video"], 1, 1], "audio": [1, sizes["audio"]]}
    return Blank(shapes, {"video": fps, "audio": rate}, frames / fps), sizes


@st.composite
def clips(draw):
    """(part, window, overlap) of any rates, with any known parts, of which there may be none."""
    fps = draw(st.sampled_from(RATES))
    rate = draw(st.sampled_from([r for r in SOUND if r >= fps]))
    window = draw(st.integers(2, 16))
    exact = window * rate / fps
    samples = draw(st.sampled_from([round(exact), int(exact), int(exact) + 1]))
    part, sizes = blank(fps, rate, window, window + draw(st.integers(0, 40)), max(samples, window))
    for name, mask in part.mask.items():
        part.values[name].normal_()
        for _ in range(draw(st.integers(0, 3))):
            start = draw(st.integers(0, len(mask)))
            mask[start : start + draw(st.integers(0, len(mask)))] = True
    return part, sizes, draw(st.integers(0, window - 1))


def filled(part, window, overlap, makes=None):
    """The clip with every window made, and (start, mask of each modality) of the windows."""
    line, seen = Timeline(part, window=window, overlap=overlap), []
    while (start := line.next()) is not None:
        values, mask = line.read(start)
        assert {k: v.shape[1] for k, v in values.items()} == window
        assert {k: v.shape for k, v in mask.items()} == {k: v.shape for k, v in values.items()}
        seen.append((start, {k: v.movedim(1, 0).flatten(1).clone() for k, v in mask.items()}))
        assert any(not m.all() for m in seen[-1][1].values()), "a window in which nothing is made"
        for m in seen[-1][1].values():
            assert torch.equal(m.all(1), m.any(1))
        made = (makes or (lambda values, mask: values.map(torch.ones_like)))(values, mask)
        line.write(start, made, made)
        assert len(seen) <= sum(line.lengths.values())
    return line, seen


@settings(deadline=None, max_examples=150)
@given(clips())
def test_every_clip_is_filled_and_what_is_known_stays(case):
    part, window, overlap = case
    before = {name: value.clone() for name, value in part.values.items()}
    line, seen = filled(part, window, overlap, makes=lambda values, _: values.map(torch.zeros_like))
    for name, mask in part.mask.items():
        assert line.mask[name].all()
        assert line.values[name].shape == before[name].shape
        assert torch.equal(line.values[name][:, mask], before[name][:, mask])
        assert torch.equal(part.values[name], before[name])  # and the part is not touched
    assert all(a < b for (a, _), (b, _) in pairwise(seen))
    assert line.next() is None


@settings(deadline=None, max_examples=150)
@given(clips())
def test_windows_begin_with_what_they_overlap(case):
    """As many known steps as asked before the first that is missing, but for what is not there.

    One more where lengths are rounded, or fewer, lest a window makes nothing.
    """
    part, window, overlap = case
    line = Timeline(part, window=window, overlap=overlap)
    last = line.lengths["video"] - window["video"]
    while (start := line.next()) is not None:
        places = {}
        for name, mask in line.mask.items():
            if not mask.all():
                place = int((~mask).nonzero()[0])
                places[name] = place * line.lengths["video"] / line.lengths[name]
        first, step = min(places.values()), line.lengths["video"] / line.lengths["audio"]
        assert start <= first + 2 * step
        if 0 < start < last:
            full = window["video"] - overlap <= 1 + 3 * step
            assert overlap - 2 * step <= first - start <= overlap + 1 + 2 * step or full
        made = line.read(start)[0]
        line.write(start, made, made)


@settings(deadline=None, max_examples=100)
@given(clips())
def test_windows_of_all_modalities_are_of_the_same_time(case):
    """To two steps of the faster one, all that rounding of rates and lengths may bring."""
    part, window, overlap = case
    for value in part.values.values():
        value[:] = torch.arange(value.shape[1]).view(1, -1, *[1] * (value.dim() - 2))
    line = Timeline(part, window=window, overlap=overlap)
    ratio = line.lengths["audio"] / line.lengths["video"]
    while (start := line.next()) is not None:
        values, _ = line.read(start)
        assert float(values["video"].flatten()[0]) == start
        assert abs(float(values["audio"].flatten()[0]) - start * ratio) <= 2
        line.write(start, values, values)


@pytest.mark.parametrize(
    ("fps", "rate", "window", "frames", "overlap", "starts"),
    [
        (10, 16000, 16, 16, 8, [0]),
        (10, 16000, 16, 40, 8, [0, 8, 16, 24]),
        (10, 16000, 16, 41, 8, [0, 8, 16, 24, 25]),
        (10, 16000, 16, 40, 0, [0, 16, 24]),
        (10, 16000, 16, 20, 15, [0, 1, 2, 3, 4]),
        (7, 4000, 4, 5, 3, [0, 1]),
        (8, 44100, 2, 30, 1, list(range(29))),
        (30000 / 1001, 16000, 16, 64, 8, [0, 8, 16, 24, 32, 40, 48]),
    ],
)
def test_where_windows_start(fps, rate, window, frames, overlap, starts):
    part, sizes = blank(fps, rate, window, frames)
    line, seen = filled(part, sizes, overlap)
    assert [start for start, _ in seen] == starts
    assert line.lengths == {"video": frames, "audio": round(frames * rate / fps)}


def known(mask, *ranges):
    for a, b in ranges:
        mask[a:b] = True


def test_a_gap_is_filled_from_both_sides():
    """The window that fills it begins before it and holds what comes after it, too."""
    part, sizes = blank(10, 40, 8, 30)
    known(part.mask["video"], (0, 12), (15, 30))
    known(part.mask["audio"], (0, 120))
    _, seen = filled(part, sizes, 4)
    ((start, masks),) = seen
    assert start == 8
    assert masks["video"].all(1).tolist() == [True] * 4 + [False] * 3 + [True]
    assert masks["audio"].all()


def test_gaps_of_several_modalities_are_filled_in_order_of_time():
    part, sizes = blank(10, 40, 8, 40)
    known(part.mask["video"], (0, 24), (28, 40))
    known(part.mask["audio"], (0, 8), (10, 88), (90, 160))
    _, seen = filled(part, sizes, 4)
    # audio at 0.2 s, then audio at 2.2 s together with the picture at 2.4 s to 2.6 s
    assert [start for start, _ in seen] == [0, 18, 22]
    assert seen[0][1]["audio"].all(1).logical_not().nonzero().flatten().tolist() == [8, 9]
    assert seen[1][1]["audio"].all(1).logical_not().nonzero().flatten().tolist() == [16, 17]
    assert seen[1][1]["video"].all(1).logical_not().nonzero().flatten().tolist() == [6, 7]


def test_a_wide_gap_is_met_from_before():
    part, sizes = blank(10, 40, 8, 40)
    known(part.mask["video"], (0, 10), (30, 40))
    known(part.mask["audio"], (0, 160))
    _, seen = filled(part, sizes, 4)
    assert [start for start, _ in seen] == [6, 10, 14, 18, 22]
    assert seen[-1][1]["video"].all(1).tolist() == [True] * 4 + [False] * 4


def test_clips_that_begin_with_something_missing():
    part, sizes = blank(10, 40, 8, 12)
    known(part.mask["video"], (3, 12))
    known(part.mask["audio"], (0, 48))
    _, seen = filled(part, sizes, 4)
    assert [start for start, _ in seen] == [0]


def test_nothing_missing():
    part, sizes = blank(10, 40, 8, 12)
    known(part.mask["video"], (0, 12))
    known(part.mask["audio"], (0, 48))
    assert Timeline(part, window=sizes, overlap=4).next() is None


@pytest.mark.parametrize("fps", RATES)
@pytest.mark.parametrize("rate", SOUND)
def test_a_blank_has_whole_steps_of_the_slowest_and_the_nearest_of_others(fps, rate):
    shapes = {"video": [3, 4, 2, 2], "audio": [2, max(4, round(4 * rate / fps))]}
    rates = {"video": fps, "audio": rate}
    own = Blank(shapes, rates)
    assert {k: list(v.shape) for k, v in own.values.items()} == shapes
    assert not any(mask.any() for mask in own.mask.values())
    assert {k: len(v) for k, v in Blank(shapes, rates, 4 / fps).mask.items()} == {
        k: len(v) for k, v in own.mask.items()
    }
    long = Blank(shapes, rates, 3.01)
    frames = len(long.mask["video"])
    assert abs(frames / fps - 3.01) <= 0.5 / fps
    assert abs(len(long.mask["audio"]) - frames * rate / fps) <= 0.5
    assert list(long.values["audio"].shape) == [2, len(long.mask["audio"])]
    with pytest.raises(ValueError, match=rf"seconds={1 / fps} is shorter than one window"):
        Blank(shapes, rates, 1 / fps)


def test_what_no_windows_can_fill_is_named():
    part, sizes = blank(10, 40, 8, 12)
    for overlap in (-1, 8):
        with pytest.raises(ValueError, match=f"overlap of {overlap} steps .* window's 8 - 1"):
            Timeline(part, window=sizes, overlap=overlap)
    with pytest.raises(ValueError, match="video lasts 12 steps, a window"):
        Timeline(part, window={"video": 13, "audio": 52}, overlap=2)
    for frames, samples in ((8, 33), (9, 65)):
        part = Part(
            {"video": torch.zeros(1, frames), "audio": torch.zeros(1, samples)},
            {"video": torch.zeros(frames).bool(), "audio": torch.zeros(samples).bool()},
        )
        with pytest.raises(
            ValueError, match=f"windows of .*'audio': 32.* leave some of .*{samples}"
        ):
            Timeline(part, window={"video": 8, "audio": 32}, overlap=2)


# ------------------------------------------------------------------------------------------- seams


def test_an_error_on_known_steps_is_taken_from_the_made_ones_beside_them():
    """Two thirds of it from the next one, one third from the one after that; nothing else moves."""
    part, sizes = blank(10, 10, 16, 16)
    known(part.mask["video"], (0, 5), (13, 16))
    known(part.mask["audio"], (0, 16))
    part.values["video"][:] = 2.0
    error = torch.tensor([0.3] * 8 + [-0.6] * 8)
    made = Media(video=(2 + error).view(1, 16, 1, 1).expand(2, -1, -1, -1), audio=error[None])
    line, _ = filled(part, sizes, 4, makes=lambda values, mask: made)
    expected = [2.0] * 5 + [2.1, 2.2, 2.3] + [1.4, 1.4, 1.4, 1.6, 1.8] + [2.0] * 3
    torch.testing.assert_close(line.values["video"][1, :, 0, 0], torch.tensor(expected))


def test_two_ends_of_a_short_gap_share_it():
    error = torch.tensor([[1.0, 5.0, 5.0, -1.0], [2.0, 5.0, 5.0, 2.0]])
    found = faded(error, torch.tensor([False, True, True, False]))
    torch.testing.assert_close(found, torch.tensor([[0, 1 / 3, -1 / 3, 0], [0, 2, 2, 0]]))
    found = faded(error, torch.tensor([False, True, False, False]))
    torch.testing.assert_close(found, torch.tensor([[0, 3.0, 0, 0], [0, 3.5, 0, 0]]))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(0, 6))
def test_fades_lie_within_missing_steps_and_never_exceed_the_error(missing, reach):
    missing = torch.tensor(missing)
    error = torch.rand(2, len(missing), 3)
    out = faded(error, missing, reach)
    assert out.shape == error.shape
    assert not out[:, ~missing].any()
    assert float(out.max()) <= float(error.max()) + 1e-6
    if missing.all() or reach == 0:
        assert not out.any()


# -------------------------------------------------------------------------------- of a real system


class Once:
    """A sampler of one evaluation where next to no noise is left, so that it sees what is known."""

    together = True

    def __call__(self, denoise, x, path, *, noise):
        yield denoise(x, torch.tensor(path.t_min, dtype=torch.float64)).x0


class Ramp(DiffusionSystem):
    """Makes every step one more than the one before, beginning at 100 or what is known.

    With `led`, sound goes on from where the picture is instead.
    """

    led = False

    def denoise(self, task):
        def predicted(x, t):
            x0 = x.map(self.ramp, x.map(lambda v: v / task.path.alpha(t)))
            if self.led:
                ratio = self.rates["audio"] / self.rates["video"]
                start = (x0["video"][:, 0, 0, 0, 0] - 100) * ratio + 100
                x0["audio"] = start.view(-1, 1, 1) + torch.arange(x["audio"].shape[2])
            return Prediction(x0, (x - task.path.alpha(t) * x0) / task.path.sigma(t))

        return predicted

    @staticmethod
    def ramp(_, v):
        """[B, C, T, ...] that goes on from the first step above 50; noise is never that large."""
        place = torch.arange(v.shape[2])
        rows = []
        for line in v.movedim(2, 1).flatten(2)[:, :, 0]:
            there = (line > 50).nonzero().flatten()
            start = 100 if not len(there) else int(line[there[0]].round()) - int(there[0])
            rows.append(start + place)
        return torch.stack(rows).float().view(len(v), 1, -1, *[1] * (v.dim() - 3)).expand_as(v)


def ramp(fps, rate, window, **options):
    model = system(
        diffusion=Diffusion(net=nn.Identity(), path=RectifiedFlow(), target="v"),
        shapes={"video": [3, window, 2, 2], "audio": [1, round(window * rate / fps)]},
        rates={"video": fps, "audio": rate},
        guides={"replace": Replace()},
        sampler=Once(),
        **options,
    )
    model.__class__ = Ramp
    return model


@pytest.mark.parametrize("overlap", [1, 4, 7])
@pytest.mark.parametrize(("fps", "rate"), [(10, 16000), (7, 4000), (30000 / 1001, 8000), (8, 9)])
def test_every_window_sees_the_end_of_the_one_before_in_its_place(fps, rate, overlap):
    model = ramp(fps, rate, 8)
    clip = model.sample(2, seconds=30 / fps, overlap=overlap)
    assert clip["video"].shape == (2, 3, 30, 2, 2)
    assert clip["audio"].shape == (2, 1, round(30 * rate / fps))
    for value in clip.values():
        place = 100 + torch.arange(value.shape[2]).view(-1, *[1] * (value.dim() - 3))
        assert float((value - place).abs().max()) == 0


@pytest.mark.parametrize("overlap", [1, 4, 7])
@pytest.mark.parametrize(("fps", "rate"), [(10, 16000), (7, 4000), (30000 / 1001, 8000)])
def test_sound_stays_with_the_picture(fps, rate, overlap):
    """To two samples, which is all that windows may be apart."""
    model = ramp(fps, rate, 8)
    model.led = True
    sound = model.sample(1, seconds=60 / fps, overlap=overlap)["audio"].flatten()
    assert float((sound - 100 - torch.arange(len(sound))).abs().max()) <= 2


def test_parts_of_different_clips_in_one_batch_keep_to_themselves():
    """Of other lengths, with other parts known, whose ramps begin elsewhere."""
    model, parts = ramp(7, 4000, 8), []
    for number, frames in enumerate((8, 30, 11, 19)):
        part, _ = blank(7, 4000, 8, frames)
        for name, mask in part.mask.items():
            place = torch.arange(len(mask)) + 1000 * (number + 1)
            part.values[name] = (
                place.view(1, -1, *[1] * (part.values[name].dim() - 2))
                .expand({"video": 3, "audio": 1}[name], -1, *[2] * (part.values[name].dim() - 2))
                .float()
            )
            known(mask, (0, 2 + number), (len(mask) - 2, len(mask) - number // 2))
        parts.append(part)
    groups = list(model.samples(range(4), given=parts, micro_batch=3))
    assert [group.index for group in groups] == [[0], [1], [2], [3]]
    for number, (group, part) in enumerate(zip(groups, parts, strict=True)):
        for name, value in group.clips.items():
            assert value.shape[1:] == part.values[name].shape
            found = value.movedim(2, 0).flatten(1)[:, 0]
            assert torch.equal(found, 1000.0 * (number + 1) + torch.arange(len(found)))

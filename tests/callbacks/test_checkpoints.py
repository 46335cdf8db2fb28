"""Names, number and wholeness of checkpoint files."""

from pathlib import Path

import pytest
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy
from tiny_system import TinySystem, fit

from avdiffusion.callbacks.checkpoint import Checkpoint


def names(folder):
    return sorted(f.name for f in Path(folder).iterdir())


def step(path):
    return torch.load(path, weights_only=True)["global_step"]


def test_step_last_and_best(tmp_path):
    system = TinySystem([3.0, 1.0, 2.0, 0.5, 4.0])
    fit(Checkpoint(dirpath=tmp_path, every=3), steps=10, system=system)
    steps = [f"step{n:07d}.ckpt" for n in (3, 6, 8, 9, 10)]  # 8 is the best, 10 the end
    assert names(tmp_path) == ["best.ckpt", "last.ckpt", *steps]
    assert step(tmp_path / "best.ckpt") == 8
    assert step(tmp_path / "last.ckpt") == 10


def test_only_the_newest_and_the_best_stay(tmp_path):
    system = TinySystem([3.0, 1.0, 2.0, 5.0, 4.0])
    fit(Checkpoint(dirpath=tmp_path, every=2, keep=1, best=2), steps=10, system=system)
    steps = [f"step{n:07d}.ckpt" for n in (4, 6, 10)]
    assert names(tmp_path) == ["best.ckpt", "last.ckpt", *steps]
    assert step(tmp_path / "best.ckpt") == 4


def test_nan_is_never_the_best(tmp_path):
    system = TinySystem([float("nan"), 2.0, float("nan")])
    fit(Checkpoint(dirpath=tmp_path, every=100), steps=6, system=system)
    assert step(tmp_path / "best.ckpt") == 4


def test_an_exception_leaves_the_last_state(tmp_path):
    class Breaks(TinySystem):
        def training_step(self, batch, at):
            if self.global_step == 3:
                raise RuntimeError("out of memory")
            return super().training_step(batch, at)

    with pytest.raises(RuntimeError, match="out of memory"):
        fit(Checkpoint(dirpath=tmp_path, every=100), steps=6, system=Breaks())
    assert step(tmp_path / "last.ckpt") == 3


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, caplog):
    save = SingleDeviceStrategy.save_checkpoint

    def fails(self, content, path, **kwargs):
        if content["global_step"] in full:
            Path(path).write_bytes(b"half of a checkpoint")
            raise OSError("no space left on device")
        save(self, content, path, **kwargs)

    full = range(4, 8)
    monkeypatch.setattr(SingleDeviceStrategy, "save_checkpoint", fails)
    caplog.set_level("INFO", "avdiffusion")
    fit(Checkpoint(dirpath=tmp_path, every=2, best=0), steps=9)
    said = [record.getMessage() for record in caplog.records if record.name == "avdiffusion"]
    assert said == [
        "no checkpoint can be written, training goes on: no space left on device",
        "step 8: checkpoints can be written again",
    ]
    steps = [f"step{n:07d}.ckpt" for n in (2, 8, 9)]
    assert names(tmp_path) == ["last.ckpt", *steps]

    full = range(4, 100)
    with pytest.raises(OSError, match="since the last checkpoint cannot be saved: no space"):
        fit(Checkpoint(dirpath=tmp_path / "second", every=2, best=0), steps=6)
    assert step(tmp_path / "second" / "last.ckpt") == 2
    assert names(tmp_path / "second") == ["last.ckpt", "step0000002.ckpt"]


def test_a_resumed_run_goes_on_counting(tmp_path):
    options = {"dirpath": tmp_path, "every": 2, "keep": 1}
    fit(Checkpoint(**options), steps=4, system=TinySystem([1.0, 2.0]))
    system = TinySystem([9.0, 9.0])
    fit(Checkpoint(**options), steps=8, system=system, ckpt=str(tmp_path / "last.ckpt"))
    assert step(tmp_path / "last.ckpt") == 8
    assert step(tmp_path / "best.ckpt") == 2
    steps = [f"step{n:07d}.ckpt" for n in (2, 8)]
    assert names(tmp_path) == ["best.ckpt", "last.ckpt", *steps]


def test_a_run_whose_folder_has_moved_goes_on(tmp_path):
    before = tmp_path / "before"
    system = TinySystem([1.0, 2.0])
    fit(Checkpoint(dirpath=before, every=2, keep=1), steps=4, system=system)
    after = before.rename(tmp_path / "after")
    fit(Checkpoint(dirpath=after, every=2, keep=1), steps=6, ckpt=str(after / "last.ckpt"))
    assert step(after / "best.ckpt") == 2
    assert names(after) == ["best.ckpt", "last.ckpt", "step0000002.ckpt", "step0000006.ckpt"]
    assert not before.exists()


def test_bad_arguments_and_unknown_monitor(tmp_path):
    with pytest.raises(ValueError, match="every=0"):
        Checkpoint(dirpath=tmp_path, every=0)
    with pytest.raises(ValueError, match=r"val/nothing.*val/loss"):
        fit(Checkpoint(dirpath=tmp_path, monitor="val/nothing"), steps=2)

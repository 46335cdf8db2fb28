"""Where Lightning goes on when it is given a checkpoint: counters, validations, what ends a run."""

import pytest
import pytorch_lightning as pl
import torch
from small_system import data, system, trainer

from avdiffusion.systems.resume import FitLoop


class Watch(pl.Callback):
    """Notes what happens at which step; may save, or end, at one of them."""

    def __init__(self, save=None, fail=None):
        self.save, self.fail, self.seen = save, fail, []

    def on_train_batch_end(self, trainer, model, outputs, batch, at):
        self.seen.append(("batch", trainer.global_step, tuple(batch["position"])))
        if self.fail == len(self.seen):
            raise KeyError("stop here")
        if self.save and self.save[0] == trainer.global_step:
            trainer.save_checkpoint(self.save[1])
            self.save = None

    def on_validation_end(self, trainer, model):
        self.seen.append(("validation", trainer.global_step))

    def on_train_end(self, trainer, model):
        self.seen.append(("end", trainer.global_step))


def run(steps=8, *, ckpt=None, micro_batch=4, **watch):
    """What training to that step did, with a validation every two steps of four clips."""
    watch = Watch(**watch)
    shares = 4 // micro_batch
    options = {"accumulate_grad_batches": shares, "val_check_interval": 2 * shares}
    fitting = trainer(steps, callbacks=[watch], **options)
    FitLoop.replace(fitting)
    model = system()
    module = data(batch_size=4, micro_batch=micro_batch)
    fitting.fit(model, module, ckpt_path=ckpt, weights_only=True)
    return watch.seen, model.state_dict(), fitting


def after(seen, step):
    """What of a whole run comes after that step's batches.

    The last micro-batch of a step is the first to carry its number.
    """
    last = [what[:2] for what in seen].index(("batch", step))
    return seen[last + 1 :]


@pytest.mark.parametrize("micro_batch", [4, 2])
@pytest.mark.parametrize("step", [3, 4, 7, 8])
def test_goes_on_as_if_it_had_not_stopped(tmp_path, step, micro_batch):
    """Saved at step 4 and 8 before the validation that belongs to them; 8 is the last step."""
    whole, weights, _ = run(micro_batch=micro_batch)
    file = tmp_path / "x.ckpt"
    run(step, micro_batch=micro_batch, save=(step, file))
    rest, again, fitting = run(ckpt=file, micro_batch=micro_batch)
    assert rest == after(whole, step)
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    assert fitting.fit_loop.epoch_loop._batches_that_stepped == 8


def test_goes_on_in_other_shares(tmp_path):
    whole, _, _ = run(micro_batch=2)
    run(4, save=(4, tmp_path / "x.ckpt"))
    rest, _, _ = run(ckpt=tmp_path / "x.ckpt", micro_batch=2)
    assert rest == after(whole, 4)


def test_what_an_unfinished_step_had_accumulated_is_done_again(tmp_path):
    whole, weights, _ = run(micro_batch=1)
    # nine micro-batches: two steps and a validation, and one micro-batch of the third
    watch = Watch(fail=10)
    fitting = trainer(8, callbacks=[watch], accumulate_grad_batches=4, val_check_interval=8)
    with pytest.raises(KeyError, match="stop here"):
        fitting.fit(system_ := system(), data(batch_size=4, micro_batch=1))
    assert system_.global_step == 2
    fitting.strategy.connect(system_)
    fitting.save_checkpoint(tmp_path / "x.ckpt")
    rest, again, _ = run(ckpt=tmp_path / "x.ckpt", micro_batch=1)
    assert rest == after(whole, 2)[1:]  # the validation is over
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_a_finished_run_can_go_on_to_a_later_step(tmp_path):
    whole, weights, _ = run(10)
    _, _, fitting = run(8)
    fitting.save_checkpoint(tmp_path / "x.ckpt")
    rest, again, _ = run(10, ckpt=tmp_path / "x.ckpt")
    assert rest == after(whole, 8)[1:]
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_the_position_in_the_data_is_kept_when_the_batch_changes(tmp_path, caplog):
    _, _, fitting = run(3)
    fitting.save_checkpoint(tmp_path / "x.ckpt")
    watch = Watch()
    fitting = trainer(5, callbacks=[watch])
    fitting.fit(system(), data(batch_size=6), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert [p for _, _, p in watch.seen[:-1]] == [tuple(range(12, 18)), tuple(range(18, 24))]
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)["DataModule"]
    assert stored == {"consumed": 12, "step": 3, "epoch": 0, "seed": 0, "size": 20}
    trainer(4).fit(system(), data(30, batch_size=4), ckpt_path=tmp_path / "x.ckpt")
    assert "data size was 20, is 30" in caplog.text


@pytest.mark.parametrize("lr", [0.1, 0.02])
def test_settings_are_those_of_the_config_and_not_of_the_checkpoint(tmp_path, lr):
    def halves(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    class Rates(pl.Callback):
        seen = []

        def on_train_batch_start(self, trainer, *_):
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            self.seen.append((trainer.global_step, rate))

    first, watch = trainer(3), Rates()
    first.fit(system(lr=0.1, lr_schedule=halves), data(batch_size=4))
    first.save_checkpoint(tmp_path / "x.ckpt")
    model, other = system(lr=lr, lr_schedule=halves), trainer(5, callbacks=[watch])
    other.fit(model, data(batch_size=4), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert watch.seen == [(3, lr * 0.5**3), (4, lr * 0.5**4)]

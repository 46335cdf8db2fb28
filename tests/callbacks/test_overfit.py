"""The verdict of `debug=overfit`."""

import logging

import pytest
from tiny_system import TinySystem, fit

from avdiffusion.callbacks.overfit import Overfit


def verdict(caplog, system, steps=30):
    with caplog.at_level(logging.INFO, "avdiffusion"):
        fit(Overfit(), steps=steps, system=system)
    (record,) = [r for r in caplog.records if "overfit" in r.getMessage()]
    return record


def test_a_loss_that_falls(caplog):
    """The weight starts at 1 and shrinks by a fifth a step, its loss is its square."""
    record = verdict(caplog, TinySystem())
    first = (1 + 0.8**2 + 0.8**4) / 3
    last = (0.8**54 + 0.8**56 + 0.8**58) / 3
    assert record.levelno == logging.INFO
    assert f"loss {first:.4g} -> {last:.4g} in 30 steps" in record.getMessage()
    assert record.getMessage().endswith("it learns")


def test_a_loss_that_stays(caplog):
    class Stuck(TinySystem):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            optimizer.param_groups[0]["lr"] = 1e-4
            return optimizer

    record = verdict(caplog, Stuck())
    assert record.levelno == logging.WARNING
    assert "does NOT learn" in record.getMessage()


def test_few_steps_and_wrong_shares(caplog):
    assert "in 1 steps (100 % are left)" in verdict(caplog, TinySystem(), steps=1).getMessage()
    for share in (0.0, 1.0, -2):
        with pytest.raises(ValueError, match=f"share={share}"):
            Overfit(share=share)

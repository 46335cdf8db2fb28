"""Steps are profiled, files written, and the run ends."""

import gzip
import json
import logging

import pytest
from tiny_system import TinySystem, fit

from avdiffusion.callbacks.profile import Profile


@pytest.mark.parametrize("accumulated", [1, 3])
def test_the_trace_holds_the_steps_that_were_asked_for(tmp_path, caplog, accumulated):
    with caplog.at_level(logging.INFO, "avdiffusion"):
        trainer, _ = fit(
            Profile(out=tmp_path / "profile", warmup=2, steps=4, top=5),
            steps=100,
            accumulate_grad_batches=accumulated,
        )
    assert trainer.global_step == 6
    with gzip.open(tmp_path / "profile" / "trace.json.gz") as file:
        events = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    # micro-batches cost a backward pass each, steps of the optimiser one
    assert events.count("Optimizer.step#SGD.step") == 4
    assert events.count("aten::pow") >= 4 * accumulated
    table = (tmp_path / "profile" / "operations.txt").read_text()
    assert "aten::pow" in table
    (summary,) = [m for m in caplog.messages if m.startswith("operation")]
    lines = summary.splitlines()
    assert len(lines) == 6
    shares = [float(line.split("%")[0].split()[-1]) for line in lines[1:]]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 100.5


def test_a_run_that_is_too_short_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"2 \+ 4 steps .* trainer.max_steps=5"):
        fit(Profile(out=tmp_path, warmup=2, steps=4), steps=5, system=TinySystem())
    with pytest.raises(ValueError, match="warmup=0"):
        Profile(out=tmp_path, warmup=0)

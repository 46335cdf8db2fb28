"""No test reaches the network, the user's cache or a W&B account."""

import logging
import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    # after a run in this process it has something to say of every line on stderr
    monkeypatch.setattr(logging.getLogger("wandb"), "propagate", False)


def pytest_configure():
    # small tensors: more threads only wait for each other
    torch.set_num_threads(1)
    if "PYTEST_XDIST_WORKER" in os.environ:  # as do those of commands in several workers
        os.environ.setdefault("OMP_NUM_THREADS", "1")

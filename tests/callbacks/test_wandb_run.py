"""W&B needs no account and stops no run, and restarts form one run."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_system import TinySystem, fit
from wandb_reader import history, records, summary
from wandb_server import wandb_server

from avdiffusion.callbacks import wandb_run
from avdiffusion.callbacks.wandb_run import earlier, labels, logged_in, wandb_logger

STEP = "trainer/global_step"


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A user without a W&B account."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_login_is_looked_for_without_asking(tmp_path, nobody, monkeypatch):
    assert not logged_in()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "k" * 40)
    assert logged_in()
    (tmp_path / "netrc").write_text("machine example.org login user password x")
    assert not logged_in()
    (tmp_path / "netrc").write_text("nonsense {")
    assert not logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert logged_in()


def test_without_the_package_one_line_and_no_logger(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb_run, "find_spec", lambda _: None)
    with caplog.at_level(logging.WARNING, "avdiffusion"):
        assert wandb_logger(save_dir=tmp_path) is None
    assert len(caplog.messages) == 1
    assert "not installed" in caplog.text


def test_a_server_that_refuses_makes_the_run_offline(tmp_path, nobody, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "too short")
    with caplog.at_level(logging.INFO, "avdiffusion"):
        fit(logger=[wandb_logger(save_dir=tmp_path)], steps=2)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert sum("cannot start in mode online" in m for m in caplog.messages) == 1
    assert sum("wandb sync" in m for m in caplog.messages) == 1


def test_a_logger_that_breaks_does_not_stop_the_run(tmp_path, nobody, monkeypatch, caplog):
    logger = wandb_logger(save_dir=tmp_path)
    run = logger.experiment

    def broken(*_, **__):
        raise BrokenPipeError("the service is gone")

    monkeypatch.setattr(run, "log", broken)
    with caplog.at_level(logging.WARNING, "avdiffusion"):
        trainer, _ = fit(logger=[logger], steps=6)
    assert trainer.global_step == 6
    assert sum("the service is gone" in m for m in caplog.messages) == 1


def test_the_mode_can_be_set_from_outside(tmp_path, nobody, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    fit(logger=[wandb_logger(save_dir=tmp_path)], steps=2)
    assert not list(tmp_path.glob("wandb/*run-*"))


def test_building_a_logger_starts_no_run(tmp_path, nobody):
    logger = wandb_logger(save_dir=tmp_path / "quickstart" / "now", tags=["a"])
    assert logger._wandb_init["name"] == "quickstart/now"
    assert logger._experiment is None
    assert not list(tmp_path.glob("**/offline-run-*"))
    assert "wandb" in sys.modules


def runs(tmp_path):
    return sorted(tmp_path.glob("wandb/offline-run-*"))


def test_restarts_form_one_run(tmp_path, nobody):
    """W&B gives every process a folder of its own; what is one run has one id."""
    assert earlier(tmp_path) is None
    fit(logger=[wandb_logger(save_dir=tmp_path)], steps=4)
    (first,) = runs(tmp_path)
    # W&B names folders by the second, so that this one is the older for certain.
    first = first.rename(first.with_name("offline-run-20200101_000000-" + earlier(tmp_path)))
    fit(logger=[wandb_logger(save_dir=tmp_path)], steps=4)
    assert len(runs(tmp_path)) == 2
    (before,), (after,) = (records(folder, "run") for folder in runs(tmp_path))
    assert before["run_id"] == after["run_id"] == earlier(tmp_path)
    assert after["resume"] is True
    assert earlier(tmp_path / "elsewhere") is None
    # of two different ones, the newest, online or offline
    other = tmp_path / "wandb" / "run-20300101_000000-zzzz9999"
    other.mkdir()
    (other / "run-zzzz9999.wandb").touch()
    assert earlier(tmp_path) == "zzzz9999"


def test_runs_are_grouped_by_experiment_or_sweep(tmp_path, nobody):
    one = tmp_path / "runs" / "folder" / "2030-01-31_12-00-00"
    point = tmp_path / "runs" / "folder" / "multirun" / "2030-01-31_12-00-00" / "seed-1"
    assert labels(one) == ("folder/2030-01-31_12-00-00", "folder")
    assert labels(point) == ("seed-1", "folder/2030-01-31_12-00-00")
    fit(logger=[wandb_logger(save_dir=point)], steps=2)
    (run,) = records(runs(point)[0], "run")
    assert (run["display_name"], run["run_group"]) == labels(point)
    assert run["job_type"] == "train"
    assert run["project"] == "avdiffusion"
    given = wandb_logger(save_dir=one, name="mine", group="ours")._wandb_init
    assert (given["name"], given["group"]) == ("mine", "ours")


def test_the_axis_is_the_step_and_the_best_loss_is_kept(tmp_path, nobody):
    system = TinySystem([3.0, 1.0, 2.0])
    system.save_hyperparameters({"model": {"lr": 0.1}, "seed": 3})
    fit(logger=[wandb_logger(save_dir=tmp_path)], steps=6, system=system)
    (folder,) = runs(tmp_path)
    metrics = records(folder, "metric")
    assert any(m.get("glob_name") == "*" and m["step_metric"] == STEP for m in metrics)
    rows = [row for row in history(folder) if "val/loss" in row]
    assert [row["val/loss"] for row in rows] == [3, 1, 2]
    assert all(STEP in row for row in history(folder))
    told = summary(folder)
    assert told["summary"]["val/loss"] == {"min": 1, "last": 2}
    assert told["config"]["model"] == {"lr": 0.1}


def test_a_server_that_is_not_there_makes_the_run_offline(tmp_path, nobody, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    logger = wandb_logger(save_dir=tmp_path)
    assert logger._wandb_init["mode"] == "online"
    assert 0 < logger._wandb_init["settings"].init_timeout <= 60
    logger._wandb_init["settings"].init_timeout = 2
    with caplog.at_level(logging.INFO, "avdiffusion"):
        trainer, _ = fit(logger=[logger], steps=2)
    assert trainer.global_step == 2
    assert sum("cannot start in mode online (training goes on)" in m for m in caplog.messages) == 1
    assert len(runs(tmp_path)) == 1
    assert logger._wandb_init["settings"].finish_timeout == wandb_run.FINISH


@pytest.fixture
def own_service(monkeypatch):
    """Processes do not share the one that W&B has started for this one."""
    monkeypatch.delenv("WANDB_SERVICE", raising=False)


@pytest.mark.slow
def test_sync_puts_the_folders_of_a_run_into_one(tmp_path, nobody, own_service):
    """Two starts, of which the second takes step 3 again; uploaded by W&B's own command."""
    for day, steps in enumerate(((1, 2, 3), (3, 4)), 1):
        logger = wandb_logger(save_dir=tmp_path)
        for step in steps:
            logger.log_metrics({"val/loss": float(step)}, step)
        logger.finalize("success")
        # W&B names folders by the second, so that these two may be one
        runs(tmp_path)[-1].rename(
            tmp_path / "wandb" / f"offline-run-2020010{day}_000000-{earlier(tmp_path)}"
        )
    with wandb_server() as server:
        words = [sys.executable, "-m", "wandb", "sync", "-p", "p", "-e", "e"]
        user = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "k" * 40}
        done = subprocess.run(
            [*words, *map(str, tmp_path.glob("wandb/offline-run-*"))],
            env=user,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
            timeout=200,
        )
        rows, opened = server.rows, server.runs
    assert [row[STEP] for row in rows] == [1, 2, 3, 3, 4], done.stderr
    assert [row["_step"] for row in rows] == [0, 1, 2, 3, 4]
    assert opened == {earlier(tmp_path)}


LOST = """
import logging, sys, time
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
from avdiffusion.callbacks import wandb_run
from wandb_server import wandb_server
import os

wandb_run.FINISH = 2
with wandb_server() as server:
    os.environ["WANDB_BASE_URL"] = server.url
    logger = wandb_run.wandb_logger(save_dir=sys.argv[1])
    logger.log_metrics({"x": 1}, 1)
    while not server.rows:
        time.sleep(0.1)
for step in range(2, 50):
    logger.log_metrics({"x": step}, step)
logger.finalize("success")
print("end")
"""


@pytest.mark.slow
def test_a_network_that_is_lost_holds_up_the_end_for_a_while(
    tmp_path, nobody, own_service, monkeypatch
):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    command = [sys.executable, "-c", LOST, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "end"
    assert "Traceback" not in done.stderr
    (folder,) = tmp_path.glob("wandb/run-*")
    assert f"wandb sync --include-online {folder}" in done.stderr
    assert [row["x"] for row in history(folder)] == list(range(1, 50))


KILLED = """
import logging, os, signal, subprocess, sys, time
from pathlib import Path
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
from avdiffusion.callbacks.wandb_run import wandb_logger

folder = Path(sys.argv[1])
logger = wandb_logger(save_dir=folder / "a")
logger.log_metrics({"x": 1}, 1)
found = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(os.getpid())],
                       capture_output=True, text=True).stdout.splitlines()
(service,) = [int(line.split()[0]) for line in found if "wandb-core" in line]
os.kill(service, signal.SIGKILL)
for step in range(2, 40):
    logger.log_metrics({"x": step}, step)
    print("step", step)
    time.sleep(0.02)
logger.finalize("success")
other = wandb_logger(save_dir=folder / "b")
other.log_metrics({"x": 7}, 1)
other.finalize("success")
print("end")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds W&B's process with ps")
def test_wandbs_own_process_may_be_killed(tmp_path, nobody, own_service):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "end"
    assert "Traceback" not in done.stderr
    assert sum("(training goes on)" in line for line in done.stderr.splitlines()) == 1
    assert len(done.stderr.splitlines()) < 12, done.stderr
    (row,) = history(runs(tmp_path / "b")[0])
    assert row["x"] == 7

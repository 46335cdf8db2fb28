"""Run folders of every kind, whole and broken, and the table of them."""

import csv
import json
import os

import pytest

from avdiffusion import run_folder, runs


def make(folder, *, overrides=(), rows=(), config=None, **record):
    """A run folder; `rows` are those of metrics.csv, `record` becomes run.json."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {word}\n" for word in overrides))
    if rows:
        with (folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)))
            writer.writeheader()
            writer.writerows(rows)
    if config:
        (folder / "config.yaml").write_text(config)
    if record:
        (folder / "run.json").write_text(json.dumps(record))
    return folder


def finished(folder, value, *, best=None, seconds=100.0, step=50, metrics=None, name="val/loss"):
    metrics = {"val/loss": value, **(metrics or {})}
    words = folder.name.replace("-", "=").split("_")
    make(
        folder,
        status="finished",
        step=step,
        max_steps=50,
        seconds=seconds,
        overrides=["model.optimizer." + words[0], *words[1:], "logger=csv"],
        objective={"name": name, "value": metrics[name]},
        metrics=metrics,
        best={"step": 40, "value": best or value, "monitor": "val/loss"},
    )
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "best.ckpt").touch()


@pytest.fixture
def sweep(tmp_path):
    """Two rates and two seeds, with the best in the middle."""
    root = tmp_path / "sweep"
    finished(root / "lr-0.1_seed-0", 0.9, best=0.8, seconds=3725)
    finished(root / "lr-0.1_seed-1", 0.7)
    finished(root / "lr-0.01_seed-0", 0.30001, metrics={"sample/toy_f1": 0.5})
    finished(root / "lr-0.01_seed-1", 0.4, metrics={"sample/toy_f1": 0.25})
    return root


@pytest.fixture
def shown(capsys):
    """Runs the command; gives its lines, split at two or more spaces."""

    def run(*words):
        runs.main([str(word) for word in words])
        lines = capsys.readouterr().out.splitlines()
        return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]

    return run


def names(table):
    return [line[0] for line in table[1:] if line and line[0].startswith("lr-")]


def test_the_best_comes_first_and_is_named_last(sweep, shown):
    table = shown(sweep)
    head = "run;lr;seed;status;step;best val/loss;at;sample/toy_f1;val/loss;time"
    assert table[0] == head.split(";")
    assert names(table) == ["lr-0.01_seed-0", "lr-0.01_seed-1", "lr-0.1_seed-1", "lr-0.1_seed-0"]
    last = "lr-0.1_seed-0;0.1;0;finished;50/50;0.8;40;-;0.9;1:02:05"
    assert table[4] == last.split(";")
    best = sweep / "lr-0.01_seed-0" / "checkpoints" / "best.ckpt"
    assert table[-1] == [f"best: lr-0.01_seed-0, val/loss 0.3: {best}"]


def test_sorting_by_anything(sweep, shown):
    assert names(shown(sweep, "--sort", "seconds"))[-1] == "lr-0.1_seed-0"
    assert names(shown(sweep, "--sort", "lr"))[:2] == ["lr-0.01_seed-0", "lr-0.01_seed-1"]
    assert names(shown(sweep, "--sort", "model.optimizer.lr", "--reverse"))[0] == "lr-0.1_seed-0"
    # what a run does not have comes last, whichever way round
    for extra in ([], ["--reverse"]):
        order = names(shown(sweep, "--sort", "sample/toy_f1", *extra))
        assert {n[:6] for n in order[:2]} == {"lr-0.0"}
    table = shown(sweep, "--best", "max")
    assert names(table)[0] == "lr-0.1_seed-0"
    assert "best: lr-0.1_seed-0" in table[-1][0]
    with pytest.raises(SystemExit, match="none of these runs has it"):
        shown(sweep, "--sort", "nothing")


def test_of_scores_more_is_better(tmp_path, shown):
    for seed, score in ((0, 0.2), (1, 0.6), (2, 0.4)):
        folder = tmp_path / f"lr-1_seed-{seed}"
        finished(folder, 1.0, metrics={"sample/toy_f1": score}, name="sample/toy_f1")
    table = shown(tmp_path)
    assert names(table) == [f"lr-1_seed-{seed}" for seed in (1, 2, 0)]
    assert "best: lr-1_seed-1, sample/toy_f1 0.6" in table[-1][0]


def test_chosen_columns_and_csv(sweep, shown, tmp_path):
    table = shown(sweep, "--columns", "run,lr,objective,val/loss", "--csv", tmp_path / "out.csv")
    assert table[1] == ["lr-0.01_seed-0", "0.01", "0.3", "0.3"]
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == names(table)
    assert rows[0]["model.optimizer.lr"] == "0.01"
    assert float(rows[0]["objective"]) == 0.30001
    assert rows[0]["sample/toy_f1"] == "0.5"
    assert rows[2]["sample/toy_f1"] == ""
    assert rows[0]["logger"] == "csv"
    assert rows[0]["folder"] == str(sweep / "lr-0.01_seed-0")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out.csv", "sweep"]


def test_runs_without_a_record(tmp_path, shown):
    """Older ones, or of another program: what metrics.csv and config.yaml say."""
    rows = [
        {"step": 9, "train/loss": 3.0},
        {"step": 19, "val/loss": 0.5, "sample/avcorr": 0.1},
        {"step": 29, "val/loss": 0.25},
        {"step": 39, "val/loss": 0.75, "sample/avcorr": 0.2},
    ]
    config = "objective: val/loss\ntrainer:\n  max_steps: 100\n"
    make(tmp_path / "old", rows=rows, config=config, overrides=["+data.root='a, b'"])
    table = shown(tmp_path)
    assert table[1] == ["old", "unknown", "39/100", "0.25", "29", "0.2", "0.75", "-"]
    # a run folder itself
    assert shown(tmp_path / "old")[1] == table[1]


@pytest.mark.parametrize("size", [0, 1, 20, 60])
def test_half_written_files_are_named(sweep, shown, size):
    broken = sweep / "lr-0.1_seed-0"
    whole = (broken / "run.json").read_text()
    (broken / "run.json").write_text(whole[:size])
    (broken / "metrics.csv").write_bytes(b"step,val/loss\n9,0.6\n19,0.\x00\n29")
    (broken / "config.yaml").write_text("a: [1, 2")
    (broken / ".hydra" / "overrides.yaml").write_text("- seed=3\n- lr: 'x\n")
    text = "\n".join(" ".join(line) for line in shown(sweep))
    for name in ("run.json", "config.yaml", "overrides.yaml"):
        assert f"not readable: {broken}" in text
        assert name in text
    assert "best: lr-0.01_seed-0" in text
    assert run_folder.status(broken) == {}


def test_files_that_hold_something_else(tmp_path, shown):
    for number, content in enumerate(("[]", "3", '{"objective": 3, "best": [], "metrics": "x"}')):
        make(tmp_path / str(number))
        (tmp_path / str(number) / "run.json").write_text(content)
        (tmp_path / str(number) / "config.yaml").write_text("- a list\n")
        (tmp_path / str(number) / "metrics.csv").write_text("no,steps\n1,2,3\n")
    table = shown(tmp_path, "--all")
    assert table[-1] == ["none of these runs has an objective yet"]
    assert sorted(line[0] for line in table[1:4]) == ["0", "1", "2"]


def test_failed_and_running_runs(sweep, shown):
    run_folder.fail(make(sweep / "lr-9_seed-0", overrides=["model.optimizer.lr=9"]), "too large")
    running = {"objective": {"name": "val/loss", "value": 0.1}}
    make(sweep / "lr-8_seed-0", status="running", step=3, max_steps=50, **running)
    for file in (sweep / "lr-8_seed-0").rglob("*"):
        os.utime(file, (0, os.stat(file).st_mtime - 7300))
    table = shown(sweep)
    assert names(table)[0] == "lr-8_seed-0"
    assert "running, 2 h ago" in table[1]
    assert names(table)[5].startswith("lr-9_seed-0")
    assert ["lr-9_seed-0: too large"] in table
    assert run_folder.status(sweep / "lr-9_seed-0")["status"] == "failed"


def test_a_run_that_fails_is_marked_unless_it_is_finished(tmp_path):
    folder = make(tmp_path / "run", status="finished", step=3)
    run_folder.fail(folder, "no data")
    assert run_folder.status(folder) == {"status": "finished", "step": 3}
    folder = make(tmp_path / "other", status="running", step=3)
    run_folder.fail(folder, "no data")
    told = {"name": "other", "status": "failed", "step": 3, "error": "no data"}
    assert run_folder.status(folder) == told


def test_what_never_began_is_counted(sweep, shown):
    make(sweep / "lr-7_seed-0")
    table = shown(sweep)
    assert "lr-7_seed-0" not in names(table)
    assert ["1 more ended before training began; --all shows them"] in table
    assert "lr-7_seed-0" in names(shown(sweep, "--all"))
    with pytest.raises(SystemExit, match="1 more ended before"):
        shown(sweep / "lr-7_seed-0")
    with pytest.raises(SystemExit, match="error: no folder"):
        shown(sweep / "nowhere")


def test_folders_are_found_newest_first(tmp_path):
    for age, name in enumerate(("a/one", "a/multirun/now/two", "three")):
        for file in make(tmp_path / name, status="finished").rglob("*"):
            os.utime(file, (0, 1000 - age))
    (tmp_path / "a" / "one" / "samples" / "run.json").mkdir(parents=True)
    (tmp_path / "a" / "multirun" / "now" / ".submitit").mkdir()
    (tmp_path / "empty").mkdir()
    found = [str(folder.relative_to(tmp_path)) for folder in run_folder.folders(tmp_path)]
    assert found == ["a/one", "a/multirun/now/two", "three"]


def test_a_table_fits_the_terminal(sweep):
    rows, _ = runs.read_all(sweep)
    rows[0]["run"] = "a" * 100 + "_seed-0"
    chosen = runs.columns(rows)
    wide = runs.table(rows, chosen).splitlines()
    narrow = runs.table(rows, chosen, 110).splitlines()
    assert max(map(len, wide)) > 170
    assert max(map(len, narrow)) <= 110
    assert "…" in narrow[1]
    assert "_seed-0" in narrow[1]
    assert max(map(len, runs.table(rows, chosen, 40).splitlines())) <= 40


def test_many_differences_share_a_column(tmp_path):
    make(tmp_path / "a", status="finished", overrides=[f"x.key{k}={k}" for k in range(9)])
    make(tmp_path / "b", status="finished", overrides=["ckpt=auto"])
    rows, _ = runs.read_all(tmp_path)
    assert runs.columns(rows)[-1] == "overrides"
    assert "key0=0 key1=1" in runs.table(rows, runs.columns(rows))


def test_different_objectives_have_no_best(tmp_path, shown):
    finished(tmp_path / "lr-1_seed-0", 0.3)
    finished(tmp_path / "lr-1_seed-1", 0.3, metrics={"x": 1.0}, name="x")
    assert "the objectives differ (" in shown(tmp_path)[-1][0]

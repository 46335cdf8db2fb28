"""Entry points run as a user runs them: processes of their own, with their exit status and output.

Importing torch, Lightning and Hydra takes seconds, so one process imports them and forks for every
command; what happens in the fork is what happens in a fresh process.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

SERVER = """
import json, os, runpy, sys
from pathlib import Path
import torch, pytorch_lightning, hydra, av, PIL.Image, ema_pytorch
import avdiffusion.checkpoint, avdiffusion.callbacks.samples, avdiffusion.data.clips

def redirect(path, number):
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, number)

for line in sys.stdin:
    folder, *command = json.loads(line)
    child = os.fork()
    if child == 0:
        redirect(f"{folder}.out", 1)
        redirect(f"{folder}.err", 2)
        sys.path[0], sys.argv = str(Path(command[0]).absolute().parent), command
        runpy.run_path(command[0], run_name="__main__")
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Result:
    """Exit status and output of a command."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The only line on stderr beside progress bars, which begins with `error:`."""
        lines = [line for line in self.err.splitlines() if line.strip() and "%|" not in line]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        return lines[0].removeprefix("error: ")


class Project:
    """The entry points and configs in a folder of their own, to run commands in."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("train.py", "sample.py"):
            shutil.copy(ROOT / name, folder / name)
        shutil.copytree(ROOT / "configs", folder / "configs")
        self.outputs = folder.with_name(f"{folder.name}_output")
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, command: str) -> Result:
        """Runs a line such as `python train.py seed=1`, split as a shell splits it."""
        python, *words = shlex.split(command)
        assert python == "python"
        self.server.stdin.write(json.dumps([str(self.outputs), *words]) + "\n")
        self.server.stdin.flush()
        status = int(self.server.stdout.readline())
        out, err = (Path(f"{self.outputs}.{kind}").read_text() for kind in ("out", "err"))
        return Result(status, out, err)

    def files(self) -> set[str]:
        """Files that commands have left, without the records of their configs and logs."""
        files = {str(f.relative_to(self.folder)) for f in self.folder.rglob("*") if f.is_file()}
        records = re.compile(r"configs/|(train|sample)\.py|.*(\.hydra/|\.log$|config\.yaml$)")
        return {f for f in files if not records.match(f)}

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()

"""Entry points run as a user runs them: processes of their own, with their exit status and output.

Importing torch, Lightning and Hydra takes seconds, so one process imports them and forks for every
command; what happens in the fork is what happens in a fresh process.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

SERVER = """
import gc, json, os, runpy, sys
from pathlib import Path
import torch, pytorch_lightning, hydra, av, PIL.Image, ema_pytorch
import avdiffusion.checkpoint, avdiffusion.callbacks.samples, avdiffusion.data.clips

def redirect(path, number):
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, number)

gc.collect()
gc.freeze()  # a fork that looked through all of this for garbage would copy it first
for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        redirect(f"{request['output']}.out", 1)
        redirect(f"{request['output']}.err", 2)
        os.environ.update(request["env"])
        from lightning_fabric.utilities import rank_zero
        rank_zero.rank_zero_only.rank = int(request["env"].get("RANK", 0))
        command = request["command"]
        sys.path[0], sys.argv = str(Path(command[0]).absolute().parent), command
        sys.path.append(request["tests"])
        runpy.run_path(command[0], run_name="__main__")
        sys.exit(0)
    print(child, flush=True)
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


@dataclass(frozen=True)
class Process:
    """A command that is running, with whatever it starts."""

    project: "Project"
    pid: int
    output: str

    def send(self, number: int) -> None:
        """Sends a signal to the process."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it and its workers without warning."""
        os.killpg(self.pid, signal.SIGKILL)

    def wait(self) -> Result:
        status = self.project.ask({"wait": self.pid})
        out, err = (Path(f"{self.output}.{kind}").read_text() for kind in ("out", "err"))
        return Result(status, out, err)


class Project:
    """The entry points and configs in a folder of their own, to run commands in."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("train.py", "sample.py", "evaluate.py"):
            shutil.copy(ROOT / name, folder / name)
        shutil.copytree(ROOT / "configs", folder / "configs")
        self.outputs, self.started = folder.with_name(f"{folder.name}_output"), 0
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, command: str) -> Result:
        """Runs a line such as `python train.py seed=1`, split as a shell splits it."""
        return self.start(command).wait()

    def start(self, command: str, **env: str) -> "Process":
        """Starts it, with these environment variables."""
        python, *words = shlex.split(command)
        assert python == "python"
        self.started += 1
        output = f"{self.outputs}{self.started}"
        request = {"output": output, "command": words, "env": env, "tests": str(ROOT / "tests")}
        return Process(self, self.ask(request), output)

    def spread(self, command: str, processes: int) -> list["Process"]:
        """Starts it as torchrun does, in several processes of one group."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        common |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
        common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        return [
            self.start(command, **common, RANK=str(rank), LOCAL_RANK=str(rank))
            for rank in range(processes)
        ]

    def ask(self, request: dict) -> int:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def files(self) -> set[str]:
        """Files that commands have left, without the records of their configs and logs."""
        files = {str(f.relative_to(self.folder)) for f in self.folder.rglob("*") if f.is_file()}
        records = re.compile(
            r"configs/|(train|sample|evaluate)\.py|.*(\.hydra/|\.log$|config\.yaml$|run\.json$|\.lock$)"
        )
        return {f for f in files if not records.match(f)}

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()

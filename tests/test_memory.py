"""Memory that is freed stays with the process where that was asked for."""

import platform
import subprocess
import sys

import pytest

from avdiffusion.memory import available

GiB = 2**30
FAULTS = """
import resource, sys
import torch
from avdiffusion.memory import keep_freed
if sys.argv[1] == "kept":
    keep_freed()
for _ in range(8):
    torch.zeros(2**24).add_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.zeros(2**24).add_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries decide themselves")
def test_freed_memory_is_taken_again_without_a_page_fault():
    faults = [
        int(subprocess.check_output([sys.executable, "-c", FAULTS, how])) for how in ("no", "kept")
    ]
    assert faults[1] < 1000 < faults[0] / 10


def test_what_is_free_is_what_a_container_leaves_of_it(tmp_path):
    """Of its memory in use that of files is counted too, though the system gives it up."""
    assert available(tmp_path) == 4 * GiB
    files = {
        "proc/meminfo": f"MemTotal: {2**24} kB\nMemAvailable: {2**23} kB\nHugePages_Total: 0\n",
        "sys/fs/cgroup/memory.current": f"{3 * GiB}\n",
        "sys/fs/cgroup/memory.stat": f"anon {GiB}\nfile {2 * GiB}\ninactive_file {2 * GiB}\n",
        "sys/fs/cgroup/memory.max": "max\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available(tmp_path) == 8 * GiB
    for limit, free in ((4, 3), (64, 8), (0.5, 0)):
        (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{int(limit * GiB)}\n")
        assert available(tmp_path) == free * GiB
    assert available() > 0

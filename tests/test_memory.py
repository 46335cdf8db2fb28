"""Memory that is freed stays with the process where that was asked for."""

import platform
import subprocess
import sys

import pytest

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

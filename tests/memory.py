"""The peak memory of a process, for tests that start one."""

import re
import resource
import sys
from pathlib import Path


def peak_megabytes() -> float:
    """Of this process. Linux's ru_maxrss would include that of the process that started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        kilobytes = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert kilobytes is not None
        return int(kilobytes[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

"""Run time by activity (goodput)."""

from __future__ import annotations

import os
import time
from pathlib import Path

PARTS = ("init", "compile", "data", "step", "save", "other")
"""The activities whose seconds are counted:

init      from the start to the first batch: joining the other processes, loading the model, checking the records
compile   the first call of the step, which is traced and compiled, or read from the compile cache; and the policies that
          train.remat = "auto" tries
data      the devices waited for the batch
step      the devices computed
save      a checkpoint was written, and read back to check it
other     the devices were idle for another reason: the profiler, a slow disk under the metrics, the caller
"""


class Goodput:
    """Seconds since the start of a run by activity, one of `PARTS`.

    Args:
        began: the start, of `time.monotonic()`; now by default.

    Attributes:
        seconds: activity -> seconds so far.
    """

    def __init__(self, began: float | None = None):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._reached = time.monotonic() if began is None else began

    def until(self, moment: float, part: str) -> float:
        """Adds the seconds since the last counted moment to `part`, and returns them; 0 where `moment` is earlier."""
        spent = max(0.0, moment - self._reached)
        self.seconds[part] += spent
        self._reached += spent
        return spent

    def now(self, part: str) -> float:
        """`until` the present moment."""
        return self.until(time.monotonic(), part)

    def as_metrics(self) -> dict[str, float]:
        """The seconds of each activity, and `share`, the fraction spent in `step`."""
        return {**self.seconds, "share": self.seconds["step"] / (sum(self.seconds.values()) or 1.0)}

    def summary(self) -> str:
        """`912 s: init 5 %, compile 6 %, data 0 %, step 88 %, save 1 %, other 0 %`."""
        total = sum(self.seconds.values())
        parts = ", ".join(f"{part} {100 * spent / (total or 1.0):.0f} %" for part, spent in self.seconds.items())
        return f"{total:.0f} s: {parts}"


def start_of_process() -> float:
    """When this process began, in the time of `time.monotonic()`; now, where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        age = 0.0
    return time.monotonic() - age

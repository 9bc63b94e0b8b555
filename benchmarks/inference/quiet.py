"""Runs one timed process by itself.

Only one at a time on this machine, under a lock file that other benchmarks may share. It starts when the processors have been idle for a
second, or after a while anyhow; what others used of them meanwhile is measured, so that a disturbed run can be told. Linux groups processes
by session (sched_autogroup), which makes `nice` alone no protection against a build in another one: the process gets a session of its own
with the highest weight where we may set it.
"""

import fcntl
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

LOCK = Path(tempfile.gettempdir()) / "bench.lock"
# Fraction of one core that counts as idle.
IDLE = 0.12
TICKS = os.sysconf("SC_CLK_TCK")
# The first argument is the session's weight. Where we may not set it the run goes on with the usual one.
LAUNCH = ["sh", "-c", '{ echo "$1" > /proc/self/autogroup; } 2>/dev/null; shift; exec "$@"', "sh"]


@dataclass
class Run:
    stdout: str
    stderr: str
    status: int
    wall_s: float
    peak_rss_mib: float
    # Used by other processes meanwhile, as a fraction of one core.
    others: float


def busy_s():
    """Seconds all processors have worked since the machine started, the time a hypervisor took from them included."""
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS


def wait_until_idle(patience_s):
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        before = busy_s()
        time.sleep(1)
        if busy_s() - before < IDLE:
            return


def run(command, environment, weight, patience_s):
    """Starts the command and waits for its end; `weight` is from -20, the most, to 19. Starts after `patience_s` at the latest."""
    with open(LOCK, "a") as lock, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wait_until_idle(patience_s)
        busy, start = busy_s(), time.perf_counter()
        process = subprocess.Popen([*LAUNCH, *map(str, (weight, *command))], stdin=subprocess.DEVNULL, stdout=out, stderr=errors, env=environment,
                                   start_new_session=True)
        _, status, usage = os.wait4(process.pid, 0)
        wall, busy = time.perf_counter() - start, busy_s() - busy
        process.returncode = os.waitstatus_to_exitcode(status)
        text = []
        for file in (out, errors):
            file.seek(0)
            text.append(file.read().decode(errors="replace"))
    others = max(0.0, busy - usage.ru_utime - usage.ru_stime) / wall
    return Run(*text, process.returncode, wall, usage.ru_maxrss / 1024, others)

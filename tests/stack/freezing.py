"""Makes a process stand still as if it hung: its connections stay open, and nothing comes."""

import os
import signal
import time

import psutil

_FREEZE_S = 20
_STILL = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
"""A process that was being killed just then stands still as well."""


def freeze(pid: int) -> None:
    """Returns once nothing of the process runs any more, which takes a moment where others want the processors, too.

    Until one of its threads has got to taking the signal, the others run on.
    """
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + _FREEZE_S
    while not _stands_still(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.001)


def thaw(pid: int) -> None:
    """Lets it run on."""
    os.kill(pid, signal.SIGCONT)


def _stands_still(pid: int) -> bool:
    try:
        threads = psutil.Process(pid).threads()
        return all(psutil.Process(thread.id).status() in _STILL for thread in threads)
    except psutil.NoSuchProcess:
        return not psutil.pid_exists(pid)  # else a thread that has just ended

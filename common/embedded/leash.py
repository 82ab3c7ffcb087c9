"""Runs a command that dies with the process that started it: `python leash.py PARENT_PID COMMAND…`.

A script of its own, because the parent-death signal has to be set in the child between fork and exec, and Python code
that runs there (`preexec_fn`) may deadlock in a process with threads. It replaces itself by the command, so the
process id stays, and it uses nothing but the standard library, so that it starts in some 20 ms.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Tie this process to its parent and become the command.

    The kernel sends the signal when the *thread* that forked ends: start leashed commands from the main thread.
    It is SIGKILL, because nobody is left who could wait for a slower end or start the child again.
    """
    parent, command = int(arguments[0]), arguments[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        sys.exit("the parent ended before its child had started")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])

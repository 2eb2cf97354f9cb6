"""Ties a process to its parent: it ends with it, and leaves to it what signals of a terminal or a batch system ask for.

Run as a script, with the number of the parent and a command, it does so and then becomes that command; both outlast
`exec`. So a child is tied before Python is started anew in it and imports torch, which takes seconds.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""Option of prctl(2) that names the signal a process gets when its parent ends."""
LEFT_TO_THE_PARENT = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2),
)
"""Signals that are sent to all processes of a job, but meant for the one that was launched."""


def tie_to(parent: int) -> None:
    """Have the kernel kill this process when the process `parent` ends, however that happens."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def leave_to_the_parent() -> None:
    """Ignore what is the parent's to answer."""
    for number in LEFT_TO_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LEFT_TO_THE_PARENT)  # `processes.start` has them wait until here


if __name__ == "__main__":
    tie_to(int(sys.argv[1]))
    leave_to_the_parent()
    os.execv(sys.argv[2], sys.argv[2:])

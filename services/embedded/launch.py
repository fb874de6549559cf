"""Becomes another program that dies with its parent: `python -I -S launch.py PARENT SIGNAL UID:GID|- PROGRAM ARGS...`

It is a program of its own, run by path with an isolated interpreter (about 30 ms), because the same work in
`preexec_fn` would run Python between fork and exec of a process that has threads. Standard library only.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(argv: list[str]) -> int:
    parent, death_signal, account, *command = argv
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if account != "-":
        uid, gid = (int(part) for part in account.split(":"))
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    # After the change of user: the kernel clears the setting when credentials change.
    if libc is not None and libc.prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0) != 0:
        print(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        return 126
    if os.getppid() != int(parent):  # it died before the line above
        return 125
    for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored_by_python, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # nosec B606 # what it is for; the stack alone starts it
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

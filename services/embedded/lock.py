"""One holder per state directory: a lock that the kernel drops when its holder dies, however it dies."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from shared.errors import Conflict, InvalidInput


def prepare_state_dir(state_dir: Path) -> Path:
    """The directory as an absolute path without links, made with mode 700 where it is missing."""
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        (state_dir / "logs").mkdir(mode=0o700, exist_ok=True)
        return state_dir.resolve()
    except OSError as error:
        raise _unusable(state_dir, error) from error


class StateLock:
    """`flock` on `state_dir/NAME`, held from construction until `release`. Not inherited by child processes.

    Raises Conflict (`state_dir_in_use`), naming the holder's pid, while anyone holds it, this process included.
    """

    def __init__(self, state_dir: Path, name: str = "lock") -> None:
        path = state_dir / name
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unusable(state_dir, error) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(self._fd, 32).decode().strip() or "unknown"
            os.close(self._fd)
            raise Conflict(
                f"The state directory {state_dir} is in use by process {holder} ({path.name}). "
                "Stop that process, or choose another directory with --state-dir.",
                code="state_dir_in_use",
                param="state_dir",
            ) from error
        os.ftruncate(self._fd, 0)
        os.write(self._fd, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Gives the directory back; a second call does nothing. The file stays: unlinking it would be a race."""
        if self._fd >= 0:
            with suppress(OSError):
                os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _unusable(state_dir: Path, error: OSError) -> InvalidInput:
    return InvalidInput(
        f"The state directory {state_dir} can't be used: {error.strerror}. Choose one that this user may write to "
        "with --state-dir, or run as the user who made it.",
        code="state_dir_unusable",
        param="state_dir",
    )

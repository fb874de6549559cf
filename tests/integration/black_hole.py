"""A unix socket in front of a server's that can fall silent: connections stay open and nothing passes, which is what a
lost machine or a firewall that forgot its connections looks like from outside."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class BlackHole:
    """Listens at `path` and passes everything on to `target`, in both directions, until `swallow()`. A connection that
    was silent once stays so for good; after `let_pass()` new ones are as before."""

    def __init__(self, path: Path, target: str) -> None:
        self._target = target
        self._passing = True
        self._sockets: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._start(self._accept)

    def swallow(self) -> None:
        self._passing = False

    def let_pass(self) -> None:
        self._passing = True

    def _start(self, run: object, *arguments: object) -> None:
        threading.Thread(target=run, args=arguments, daemon=True).start()  # type: ignore[arg-type]

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.socket(socket.AF_UNIX)
                far.connect(self._target)
                self._sockets += [near, far]
                self._start(self._pump, near, far)
                self._start(self._pump, far, near)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if not self._passing:
                    return
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.let_pass()
        for each in (self._listener, *self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@contextmanager
def black_hole(path: Path, target: str) -> Iterator[BlackHole]:
    hole = BlackHole(path, target)
    try:
        yield hole
    finally:
        hole.close()

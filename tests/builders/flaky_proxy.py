"""A TCP proxy in front of a server, that can be taken down, or fall silent, and be brought back."""

import contextlib
import socket
import threading
from typing import Self
from urllib.parse import urlsplit

BLOCK = 1 << 16


class FlakyProxy:
    """Owns a listening port that leads to the server while it is up."""

    def __init__(self, server: str) -> None:
        parts = urlsplit(server)
        self._target = (str(parts.hostname), parts.port or 80)
        self._listener = self._listen(0)
        self._port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._speaks = threading.Event()
        self._speaks.set()
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.take_down()

    def take_down(self) -> None:
        """Refuse connections and cut those that are open."""
        for each in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open.clear()

    def fall_silent(self) -> None:
        """Accept connections and requests, and pass nothing on: a head that hangs."""
        self._speaks.clear()

    def speak_again(self) -> None:
        """Pass on what has arrived meanwhile, and what comes."""
        self._speaks.set()

    def bring_back(self) -> None:
        """Listen again at the same address."""
        self._listener = self._listen(self._port)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    @staticmethod
    def _listen(port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
        return listener

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(self._target)
                self._open += [client, server]
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(BLOCK):
                self._speaks.wait()
                target.sendall(block)
            target.shutdown(socket.SHUT_WR)

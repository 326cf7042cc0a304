"""A small websocket reader (RFC 6455) on the standard library, enough to follow ComfyUI's progress."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA


class WebSocket:
    """A client connection to `ws://host:port/path` that reads messages.

    Reads unfragmented messages, as ComfyUI sends them. Use as a context manager. Raises ConnectionError if
    the server refuses or closes the connection.
    """

    def __init__(self, host: str, port: int, path: str, timeout: float = 10) -> None:
        self._buffer = b""
        self._socket = socket.create_connection((host, port), timeout)
        try:
            self._handshake(host, port, path, timeout)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> WebSocket:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Say goodbye if the server still listens, and close."""
        with contextlib.suppress(OSError):  # a connection that is gone already is what closing is for
            self._send(CLOSE, b"")
        self._socket.close()

    def say(self, text: str) -> None:
        """Send a short text message."""
        self._send(TEXT, text.encode())

    def messages(self, seconds: float) -> Iterator[str]:
        """Text messages that arrive within the next `seconds`, as they arrive."""
        for kind, payload in self.frames(seconds):
            if kind == TEXT:
                yield payload.decode("utf-8")

    def frames(self, seconds: float) -> Iterator[tuple[int, bytes]]:
        """The same for messages of both kinds, TEXT and BINARY."""
        deadline = time.monotonic() + seconds
        while True:
            frame = self._take_frame()
            if frame is None:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not self._receive(remaining):
                    return
                continue
            opcode, payload = frame
            if opcode in (TEXT, BINARY):
                yield opcode, payload
            elif opcode == PING:
                self._send(PONG, payload)
            elif opcode == CLOSE:
                raise ConnectionError("the server closed the websocket")

    def _handshake(self, host: str, port: int, path: str, seconds: float) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        while b"\r\n\r\n" not in self._buffer:
            if not self._receive(seconds):
                raise ConnectionError(f"no answer to the websocket request within {seconds:g} s")
        head, self._buffer = self._buffer.split(b"\r\n\r\n", 1)
        if head.split(b" ", 2)[1:2] != [b"101"]:
            raise ConnectionError(f"no websocket at {path}: {head.splitlines()[0].decode(errors='replace')}")

    def _receive(self, seconds: float) -> bool:
        """Append what arrives within `seconds` to the buffer; False if nothing did."""
        self._socket.settimeout(seconds)
        try:
            data = self._socket.recv(65536)
        except TimeoutError:
            return False
        if not data:
            raise ConnectionError("the server closed the websocket")
        self._buffer += data
        return True

    def _take_frame(self) -> tuple[int, bytes] | None:
        """Take one whole frame off the buffer; None while it is incomplete. Servers do not mask theirs."""
        if len(self._buffer) < 2:
            return None
        size, start = self._buffer[1] & 0x7F, 2
        if size > 125:
            form, start = ("!H", 4) if size == 126 else ("!Q", 10)
            if len(self._buffer) < start:
                return None
            (size,) = struct.unpack(form, self._buffer[2:start])
        if len(self._buffer) < start + size:
            return None
        opcode, payload = self._buffer[0] & 0x0F, self._buffer[start : start + size]
        self._buffer = self._buffer[start + size :]
        return opcode, payload

    def _send(self, opcode: int, payload: bytes) -> None:
        """Send one short frame (below 126 bytes), masked as clients must."""
        mask = os.urandom(4)
        self._socket.settimeout(10)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
        self._socket.sendall(bytes([0x80 | opcode, 0x80 | len(payload)]) + mask + masked)

"""Messages between ranks, through the launcher's key-value store."""

from __future__ import annotations

import time

import torch.distributed as dist

_PIECE = 2**20  # bytes of one value; the store drops a client that sends more than 8 MiB


class Mailbox:
    """Named messages of any length. It polls, so that no rank is ever stuck in a call that a signal can't interrupt."""

    def __init__(self, store: dist.Store):
        self._store = store

    def send(self, name: str, message: bytes) -> None:
        """Leave a message for those who `receive` it."""
        pieces = [message[at : at + _PIECE] for at in range(0, len(message), _PIECE)]
        for i, piece in enumerate(pieces):
            self._store.set(f"{name}/{i}", piece)  # type: ignore[arg-type]  # it takes bytes; its stub says str
        self._store.set(name, str(len(pieces)))

    def ready(self, name: str) -> bool:
        """Return True if there is such a message."""
        return self._store.check([name])

    def receive(self, name: str, readers: int = 1) -> bytes:
        """Wait for a message and return it. The last of its `readers` deletes it."""
        pause = 0.01
        while not self.ready(name):
            time.sleep(pause)
            pause = min(0.2, 1.2 * pause)
        keys = [f"{name}/{i}" for i in range(int(self._store.get(name)))]
        message = b"".join(self._store.get(key) for key in keys)
        if self._store.add(f"{name}/read", 1) == readers:
            for key in [*keys, name, f"{name}/read"]:
                self._store.delete_key(key)
        return message

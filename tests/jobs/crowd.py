"""Agents by the hundred in one process, without ranks: `python crowd.py COUNT HALTING` with an agent's environment.

Each is a real client of the protocol on a socket of its own: it greets, names a port, says that its ranks have started,
beats, and ends them on request. Only the ranks do not exist. Every message of a halting one is up to 0.3 s late.

Lines on the standard input: `die N` closes the connection of the Nth; `garble N` sends its next frame twice; `lose N`
drops its next frame.
"""

from __future__ import annotations

import heapq
import os
import random
import select
import selectors
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bigtrain import variables
from bigtrain.jobs.protocol import Channel, PeerLost, ProtocolError, connect

RANKS = 8


class Client:
    """One agent."""

    def __init__(self, number: int, halting: bool) -> None:
        self.channel = connect(os.environ[variables.CONTROLLER], os.environ[variables.JOB_TOKEN], f"{number:04d}")
        self.generation: int | None = None
        self.first_rank = 0
        self.halting = halting

    def handle(self, message: dict[str, Any]) -> bool:
        """Handle a message; returns False when it was the last one."""
        if message["type"] == "port":
            self.channel.send("port", port=20000)
        elif message["type"] == "place":
            self.generation, self.first_rank = message["generation"], message["first_rank"]
            self.channel.send("started", generation=self.generation, pids={})
        elif message["type"] == "kill" and message["generation"] == self.generation:
            self.channel.send("ended", generation=self.generation)
            self.generation = None
        return message["type"] != "done"

    def beat(self) -> None:
        """What an agent says every second."""
        ranks = {str(self.first_rank + rank): [7, "step", 0.01] for rank in range(RANKS)}
        self.channel.keep_alive(generation=self.generation, ranks=ranks)


def damage(channel: Channel, times: int) -> None:
    """Have the channel send its next frame `times` times."""
    connection: Any = channel._connection

    class Damaged:
        def sendall(self, data: bytes) -> None:
            channel._connection = connection
            for _ in range(times):
                connection.sendall(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(connection, name)

    channel._connection = Damaged()  # type: ignore[assignment]


def main() -> None:
    """Connect all, and serve until none is left."""
    count, halting = int(sys.argv[1]), int(sys.argv[2])
    with ThreadPoolExecutor(32) as pool:
        clients = list(pool.map(lambda number: Client(number, number < halting), range(count)))
    selector = selectors.DefaultSelector()
    for client in clients:
        selector.register(client.channel, selectors.EVENT_READ, client)
    late: list[tuple[float, int, Callable[[], Any]]] = []
    alive = set(clients)

    def leave(client: Client) -> None:
        if client in alive:
            alive.discard(client)
            selector.unregister(client.channel)
            client.channel.close()

    def act(client: Client, action: Callable[[], Any]) -> None:
        try:
            if client in alive and action() is False:
                leave(client)
        except (PeerLost, ProtocolError):
            leave(client)

    def hear(client: Client) -> None:
        for message in client.channel.receive():
            if client.halting:
                when = max(time.monotonic() + random.uniform(0, 0.3), last.get(id(client), 0.0))
                last[id(client)] = when
                heapq.heappush(late, (when, len(late), lambda m=message: act(client, lambda: client.handle(m))))
            else:
                act(client, lambda m=message: client.handle(m))

    last: dict[int, float] = {}
    next_beats = 0.0
    while alive:
        for key, _ in selector.select(0.02):
            act(key.data, lambda client=key.data: hear(client))
        now = time.monotonic()
        while late and late[0][0] <= now:
            heapq.heappop(late)[2]()
        if now > next_beats:
            next_beats = now + 0.2
            for client in list(alive):
                act(client, client.beat)
        if select.select([sys.stdin], [], [], 0)[0] and (line := sys.stdin.readline()):
            command, number = line.split()
            client = clients[int(number)]
            if command == "die":
                leave(client)
            else:
                damage(client.channel, 2 if command == "garble" else 0)


if __name__ == "__main__":
    main()

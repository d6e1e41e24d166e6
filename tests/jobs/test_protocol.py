"""The protocol between agents and the controller, spoken over real sockets."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bigtrain import variables
from bigtrain.jobs import protocol
from bigtrain.jobs.protocol import (
    MAX_FRAME_BYTES,
    AgentConnection,
    Channel,
    Listener,
    PeerLost,
    ProtocolError,
    connect,
    new_token,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def token() -> str:
    return new_token()


@pytest.fixture
def listener(token: str) -> Iterator[Listener]:
    listener = Listener(token)
    yield listener
    listener.close()


@pytest.fixture
def impatient(token: str) -> Iterator[Listener]:
    """A listener whose agents and connections take 1.5 s of silence for death."""
    listener = Listener(token, silence_s=1.5)
    yield listener
    listener.close()


@pytest.fixture
def pair(listener: Listener, token: str) -> Iterator[tuple[Channel, Channel]]:
    """The two ends of one connection: the controller's and the agent's."""
    with ThreadPoolExecutor(1) as pool:
        agent = pool.submit(connect, listener.address, token)
        connection = listener.accept(2)
        assert connection is not None
        ends = connection.channel, agent.result()
    yield ends
    for end in ends:
        end.close()


def refusal(listener: Listener, stranger: Any) -> str:
    """Why the listener turned `stranger` away."""
    why: list[str] = []
    thread = threading.Thread(target=stranger, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not why and time.monotonic() < deadline:
        assert listener.accept(0.1, why.append) is None
    thread.join(60)
    return why[0]


def test_messages_arrive_whole_and_in_order_in_both_directions(pair: tuple[Channel, Channel]) -> None:
    controller, agent = pair
    long = "ü" * 100_000
    sender = threading.Thread(target=lambda: [agent.send("exited", rank=rank, tail=long) for rank in range(3)])
    sender.start()
    received: list[Any] = []
    while len(received) < 3:
        received += controller.receive()
    sender.join()
    assert [message["rank"] for message in received] == [0, 1, 2]
    assert received[2]["tail"] == long
    controller.send("done")
    assert agent.receive() == [{"type": "done"}]


def test_what_follows_the_greeting_at_once_makes_the_channel_readable(listener: Listener, token: str) -> None:
    """A message read together with the greeting would wait in memory, unseen by a selector."""
    with ThreadPoolExecutor(1) as pool:
        for _ in range(50):
            agent = pool.submit(connect, listener.address, token)
            connection = listener.accept(2)
            assert connection is not None
            connection.channel.send("port")
            channel = agent.result()
            assert select.select([channel], [], [], 2)[0], "the message is hidden"
            assert channel.receive() == [{"type": "port"}]
            channel.close()
            connection.channel.close()


def test_an_agent_with_a_wrong_token_is_refused(listener: Listener) -> None:
    outcome: list[BaseException] = []

    def stranger() -> None:
        try:
            connect(listener.address, new_token())
        except (PeerLost, ProtocolError) as error:
            outcome.append(error)

    assert "token" in refusal(listener, stranger)
    assert outcome


def test_an_agent_refuses_a_controller_without_the_token(token: str) -> None:
    impostor = Listener(new_token())
    with ThreadPoolExecutor(1) as pool:
        agent = pool.submit(connect, impostor.address, token)
        assert impostor.accept(0.3) is None
        with pytest.raises((ProtocolError, PeerLost)):
            agent.result()
    impostor.close()


def test_an_agents_proof_cannot_be_reflected_by_an_impostor(token: str) -> None:
    """A server that lets the agent prove itself and sends the same proof back is not believed."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        agent = pool.submit(connect, f"127.0.0.1:{server.getsockname()[1]}", token)
        channel = Channel(server.accept()[0], "controller")
        channel.send("challenge", version=protocol.VERSION, nonce="0" * 64)
        hello = channel.greeting("hello")
        channel.send("welcome", proof=hello["proof"], silence_s=10)
        with pytest.raises(ProtocolError, match="token"):
            agent.result()
        channel.close()


def test_another_version_is_refused(listener: Listener, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stranger() -> None:
        channel = Channel(socket.create_connection(_split(listener.address)), "agent")
        channel.greeting("challenge")
        channel.send("hello", version=protocol.VERSION + 1, nonce="0" * 64, proof="")
        channel.close()

    assert "version 2" in refusal(listener, stranger)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ((1 << 31).to_bytes(4, "big"), "a frame of 2147483648 bytes"),
        ((5000).to_bytes(4, "big") + b"x" * 5000, "a frame of 5000 bytes"),
        ((3).to_bytes(4, "big") + b"abc", "a frame of 3 bytes"),
        ((37).to_bytes(4, "big") + bytes(32) + b"[1,2]", "not an object"),
        ((36).to_bytes(4, "big") + bytes(32) + b"{{{{", "not JSON"),
        ((36).to_bytes(4, "big") + bytes(31) + b"x{{{{", "wrong authentication code"),
        (b"", "the connection"),
    ],
)
def test_what_is_no_greeting_is_refused_before_it_is_stored(listener: Listener, data: bytes, why: str) -> None:
    def stranger() -> None:
        with socket.create_connection(_split(listener.address)) as connection:
            connection.sendall(data)
            if data:
                connection.settimeout(5)
                try:
                    while connection.recv(4096):
                        pass
                except ConnectionError:
                    return

    assert why in refusal(listener, stranger)


def test_a_stranger_that_says_nothing_does_not_keep_agents_out(
    listener: Listener, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "GREETING_TIMEOUT_S", 0.3)
    with socket.create_connection(_split(listener.address)), ThreadPoolExecutor(1) as pool:
        time.sleep(0.05)

        def patient() -> Channel:
            while True:
                try:
                    return connect(listener.address, token)
                except ProtocolError:
                    continue

        agent = pool.submit(patient)
        connection = listener.accept(5)
        assert connection is not None
        connection.channel.close()
        agent.result().close()


def test_an_oversize_frame_ends_an_established_connection(pair: tuple[Channel, Channel]) -> None:
    controller, agent = pair
    with pytest.raises(ProtocolError, match="over the limit"):
        agent.send("exited", tail="x" * MAX_FRAME_BYTES)
    os.write(agent.fileno(), (MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(ProtocolError, match="a frame of"):
        controller.receive()


def test_a_repeated_or_altered_frame_is_refused(listener: Listener, token: str) -> None:
    """A relay between the two copies each byte, and then plays one frame twice."""
    with socket.create_server(("127.0.0.1", 0)) as relay, ThreadPoolExecutor(2) as pool:
        agent = pool.submit(connect, f"127.0.0.1:{relay.getsockname()[1]}", token)
        inside, _ = relay.accept()
        outside = socket.create_connection(_split(listener.address))
        accepted = pool.submit(listener.accept, 3)
        outside_file, inside_file = outside.makefile("rb"), inside.makefile("rb")

        def frame(file: Any) -> bytes:
            head = file.read(4)
            return bytes(head + file.read(int.from_bytes(head, "big")))

        inside.sendall(frame(outside_file))
        outside.sendall(frame(inside_file))
        inside.sendall(frame(outside_file))
        channel, connection = agent.result(), accepted.result()
        assert connection is not None
        channel.send("ended", generation=1)
        recorded = frame(inside_file)
        outside.sendall(recorded)
        assert connection.channel.receive()[0]["generation"] == 1
        outside.sendall(recorded)
        with pytest.raises(ProtocolError, match="authentication code"):
            connection.channel.receive()
        for end in (channel, connection.channel, inside_file, outside_file, inside, outside):
            end.close()


def test_silence_is_seen_by_either_side(impatient: Listener, token: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        agent = pool.submit(connect, impatient.address, token)
        connection = impatient.accept(2)
        assert connection is not None
    for end in (connection.channel, agent.result()):
        end.silence_s = 0.2
        time.sleep(0.25)
        with pytest.raises(PeerLost, match="nothing was heard"):
            end.keep_alive()
        end.close()


def start_agent(listener: Listener, token: str) -> tuple[subprocess.Popen[bytes], AgentConnection]:
    environment = os.environ | {
        variables.CONTROLLER: listener.address,
        variables.JOB_TOKEN: token,
        "PYTHONPATH": str(ROOT),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "bigtrain.jobs.agent"], env=environment, stderr=subprocess.DEVNULL
    )
    connection = listener.accept(10)
    assert connection is not None
    return process, connection


def place(connection: AgentConnection, path: Path) -> int:
    """Have the agent start one rank that sleeps; its process id."""
    (path / "sleeper.py").write_text("import time; time.sleep(1000)")
    connection.channel.send(
        "place",
        generation=1,
        module="sleeper",
        arguments=[],
        environment={"PYTHONPATH": f"{path}:{ROOT}"},
        logs=str(path / "logs"),
        limits=dict.fromkeys(("start", "step", "save", "evaluation", "data", "stopping"), 60),
        first_rank=0,
        procs=1,
        world_size=1,
        node_rank=0,
        master_address="127.0.0.1",
        master_port=29500,
        defaults={},
    )
    while True:
        connection.channel.keep_alive()
        for message in connection.channel.receive():
            if message["type"] == "started":
                return int(message["pids"]["0"])


def test_an_agent_that_hears_nothing_ends_its_ranks_and_itself(impatient: Listener, token: str, tmp_path: Path) -> None:
    process, connection = start_agent(impatient, token)
    rank = place(connection, tmp_path)
    assert process.wait(10) == 1
    assert not Path(f"/proc/{rank}").exists()
    connection.channel.close()


def test_an_agent_outlives_a_generation_and_exits_on_request(listener: Listener, token: str, tmp_path: Path) -> None:
    process, connection = start_agent(listener, token)
    place(connection, tmp_path)
    connection.channel.send("kill", generation=1)
    kinds: list[str] = []
    while "ended" not in kinds:
        kinds += [message["type"] for message in connection.channel.receive()]
    assert kinds.index("exited") < kinds.index("ended")
    assert process.poll() is None
    connection.channel.send("done")
    assert process.wait(5) == 0
    connection.channel.close()


def test_an_agent_that_its_machine_stops_informs_the_controller(listener: Listener, token: str, tmp_path: Path) -> None:
    process, connection = start_agent(listener, token)
    place(connection, tmp_path)
    process.terminate()
    kinds: list[str] = []
    while "notice" not in kinds:
        kinds += [message["type"] for message in connection.channel.receive()]
    connection.channel.send("done")
    assert process.wait(5) == 0
    connection.channel.close()


def test_the_token_is_on_no_command_line(listener: Listener, token: str, tmp_path: Path) -> None:
    process, connection = start_agent(listener, token)
    rank = place(connection, tmp_path)
    for pid in (process.pid, rank):
        assert token.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert token.encode() not in Path(f"/proc/{rank}/environ").read_bytes()
    connection.channel.close()
    process.wait(5)
    assert token not in json.dumps([path.read_text() for path in (tmp_path / "logs").rglob("*.log")])


def _split(address: str) -> tuple[str, int]:
    host, port = address.split(":")
    return host, int(port)

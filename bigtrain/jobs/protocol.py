"""The protocol between agents and the controller: authenticated JSON frames over TCP.

**Frames.** A frame is a length (4 bytes, big-endian: the bytes that follow), a code (32 bytes, HMAC-SHA256) and one
JSON object in UTF-8. It is at most MAX_FRAME_BYTES long, and MAX_GREETING_BYTES until both sides have proved
themselves. A longer frame, a wrong code, or what is not an object with a string under "type" ends the connection.

**Greeting.** The agent connects. Both hold the run's token, which travels to the agent by its environment
(BIGTRAIN_JOB_TOKEN), never by an argument list, a file or this connection.

    controller -> agent   challenge  {version, nonce}
    agent -> controller   hello      {version, nonce, proof, agent, host, pid, cores}   proof = H("agent", both nonces)
    controller -> agent   welcome    {proof, silence_s}                             proof = H("controller", both nonces)

H is HMAC-SHA256 under the token. The proofs differ by their first word, so that neither can be reflected; the nonces
are fresh, so that neither can be replayed. Another version is refused by both sides. Frames of the greeting carry a
code of zeros. Each later frame carries HMAC-SHA256 under the session's key, H("session", both nonces), of the
sender's role, the frame's number in its direction and its bytes: it cannot be altered, repeated, dropped or
reordered. Nothing is encrypted: on other than a private network, use a tunnel. So no secret is sent; ranks inherit
secrets from the agent's environment.

**Messages** after the greeting. A generation is one life of all ranks; messages about an older one are ignored.

    both directions       beat     {} every BEAT_S; the agent's: {generation, ranks: {rank: [step, phase, age_s]}}
    controller -> agent   port     {}                    which port is free on your machine?
    agent -> controller   port     {port}
    controller -> agent   place    {generation, module, arguments, environment, defaults, logs, limits, first_rank,
                                    procs, world_size, node_rank, master_address, master_port}: start these ranks
    agent -> controller   started  {generation, pids: {rank: pid}}
    controller -> agent   control  {word}                0 run, 1 stop, 2 save: put on every rank's page
    controller -> agent   kill     {generation}          end all ranks now
    agent -> controller   exited   {generation, rank, code, signal, step, phase, ended, traceback, tail}
                                    code is null where a signal ended it; ended: the agent itself killed it
    agent -> controller   overdue  {generation}          a rank is silent beyond its limit; `hung` follows
    controller -> agent   examine  {generation}          a rank of another node is: report on yours
    agent -> controller   hung     {generation, rank, step, phase, age_s, limit_s, stopped, answered, stacks}
                                    the likeliest culprit of this node; answered: it wrote its state when asked
    agent -> controller   ended    {generation}          none of its processes is left on this machine
    agent -> controller   notice   {signal}              the agent was asked to stop: the run should save itself
    controller -> agent   done     {}                    end all ranks and exit

**Silence.** Who hears nothing for `silence_s` (10 s), or sees the connection close, counts the other as dead: the
agent ends its ranks and exits, the controller has its placer take the agent away.

Standard library only.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

VERSION: Final = 1
MAX_FRAME_BYTES: Final = 1 << 20
MAX_GREETING_BYTES: Final = 4096
SILENCE_S: Final = 10.0
BEAT_S: Final = 1.0
GREETING_TIMEOUT_S: Final = 2.0
BACKLOG: Final = 1024
"""Agents that may connect at one moment."""
SEND_TIMEOUT_S: Final = 5.0

_CODE_BYTES: Final = 32
_NO_CODE: Final = bytes(_CODE_BYTES)

Message = dict[str, Any]
Role = Literal["agent", "controller"]


class ProtocolError(Exception):
    """The other side broke the protocol, or is not who it should be."""


class PeerLost(Exception):
    """The connection closed, or its peer was silent for too long."""


def new_token() -> str:
    """A fresh secret for one run: 256 random bits in hexadecimal."""
    return secrets.token_hex(32)


def _keyed(token: str, purpose: str, controller_nonce: str, agent_nonce: str) -> bytes:
    text = f"bigtrain {VERSION}\n{purpose}\n{controller_nonce}\n{agent_nonce}"
    return hmac.digest(token.encode(), text.encode(), "sha256")


class Channel:
    """One end of a connection: sends and receives complete messages.

    Used by one thread. Sending blocks for at most SEND_TIMEOUT_S; receiving takes what has arrived.
    """

    def __init__(self, connection: socket.socket, role: Role) -> None:
        connection.settimeout(SEND_TIMEOUT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._role: Role = role
        self._peer: Role = "controller" if role == "agent" else "agent"
        self._key: bytes | None = None
        self._sent = 0
        self._received = 0
        self._buffer = bytearray()
        self.silence_s = SILENCE_S
        self._heard = self._spoke = time.monotonic()

    def fileno(self) -> int:
        """The descriptor, for a selector."""
        return self._connection.fileno()

    def close(self) -> None:
        """Close the connection; the peer sees it at once."""
        self._connection.close()

    @property
    def peer_address(self) -> str:
        """The address from which the peer connected."""
        return str(self._connection.getpeername()[0])

    @property
    def own_address(self) -> str:
        """The address of this machine that the connection uses."""
        return str(self._connection.getsockname()[0])

    def secure(self, key: bytes, silence_s: float) -> None:
        """End the greeting: from here on frames carry codes under `key`."""
        self._key, self.silence_s = key, silence_s
        self._sent = self._received = 0
        self._connection.settimeout(SEND_TIMEOUT_S)

    def send(self, type: str, **fields: Any) -> None:
        """Send one message.

        Raises:
            PeerLost: The connection is closed, or does not take the message in time.
        """
        payload = json.dumps({"type": type, **fields}, separators=(",", ":")).encode()
        if len(payload) + _CODE_BYTES > MAX_FRAME_BYTES:
            raise ProtocolError(f"a message of {len(payload)} bytes is over the limit of {MAX_FRAME_BYTES}")
        code = self._code(self._role, self._sent, payload)
        self._sent += 1
        self._spoke = time.monotonic()
        try:
            self._connection.sendall((len(payload) + _CODE_BYTES).to_bytes(4, "big") + code + payload)
        except OSError as error:
            raise PeerLost(f"the connection broke: {error}") from error

    def receive(self) -> list[Message]:
        """The messages that have arrived; waits for the first bytes, so call it when the descriptor is readable.

        Raises:
            PeerLost: The peer closed the connection.
            ProtocolError: It sent what the protocol does not allow.
        """
        try:
            data = self._connection.recv(1 << 16)
        except OSError as error:
            raise PeerLost(f"the connection broke: {error}") from error
        if not data:
            raise PeerLost("the connection was closed")
        self._buffer += data
        messages = []
        while (message := self._take()) is not None:
            messages.append(message)
        return messages

    def keep_alive(self, **fields: Any) -> None:
        """Send a beat if the last word is BEAT_S ago, and check that the peer still speaks.

        Raises:
            PeerLost: It has said nothing for `silence_s`.
        """
        now = time.monotonic()
        if now - self._heard > self.silence_s:
            raise PeerLost(f"nothing was heard for {now - self._heard:.0f} s")
        if now - self._spoke >= min(BEAT_S, self.silence_s / 4):
            self.send("beat", **fields)

    def greeting(self, type: str) -> Message:
        """Wait for one message of the greeting, and read no byte beyond it: what follows is for `receive`."""
        deadline = time.monotonic() + GREETING_TIMEOUT_S
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise ProtocolError(f"no {type} within {GREETING_TIMEOUT_S:.0f} s")
            self._connection.settimeout(remaining)
            with contextlib.suppress(TimeoutError):
                message = self.hear(type)
                if message is not None:
                    return message

    def hear(self, type: str) -> Message | None:
        """Read what there is of one message of the greeting; None while it is incomplete.

        Raises:
            TimeoutError: Nothing came in the socket's time.
        """
        try:
            data = self._connection.recv(self._missing())
        except TimeoutError:
            raise
        except OSError as error:
            raise PeerLost(f"the connection broke: {error}") from error
        if not data:
            raise PeerLost("the connection was closed during the greeting")
        self._buffer += data
        message = self._take()
        if message is not None and message["type"] != type:
            raise ProtocolError(f"expected {type}, got {message['type']!r}")
        return message

    def _missing(self) -> int:
        """Bytes that the frame at the head of the buffer still lacks, as far as is known."""
        held = len(self._buffer)
        return 4 - held if held < 4 else 4 + int.from_bytes(self._buffer[:4], "big") - held

    def _take(self) -> Message | None:
        if len(self._buffer) < 4:
            return None
        length = int.from_bytes(self._buffer[:4], "big")
        limit = MAX_GREETING_BYTES if self._key is None else MAX_FRAME_BYTES
        if not _CODE_BYTES <= length <= limit:
            raise ProtocolError(f"a frame of {length} bytes is outside {_CODE_BYTES}..{limit}")
        if len(self._buffer) < 4 + length:
            return None
        code = bytes(self._buffer[4 : 4 + _CODE_BYTES])
        payload = bytes(self._buffer[4 + _CODE_BYTES : 4 + length])
        del self._buffer[: 4 + length]
        if not hmac.compare_digest(code, self._code(self._peer, self._received, payload)):
            raise ProtocolError("a frame carries a wrong authentication code")
        self._received += 1
        self._heard = time.monotonic()
        return _parse(payload)

    def _code(self, sender: Role, number: int, payload: bytes) -> bytes:
        if self._key is None:
            return _NO_CODE
        return hmac.digest(self._key, sender.encode() + number.to_bytes(8, "big") + payload, "sha256")


def _parse(payload: bytes) -> Message:
    try:
        message = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a frame is not JSON: {error}") from error
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise ProtocolError("a frame is not an object with a type")
    return message


def _check_proof(message: Message, expected: bytes) -> None:
    proof = message.get("proof")
    # compare_digest refuses text beyond ASCII, so compare bytes.
    if not isinstance(proof, str) or not hmac.compare_digest(proof.encode(), expected.hex().encode()):
        raise ProtocolError("the other side does not hold the run's token")


def _check_version(message: Message) -> str:
    if message.get("version") != VERSION:
        raise ProtocolError(f"the other side has protocol version {message.get('version')!r}, this one {VERSION}")
    nonce = message.get("nonce")
    if not isinstance(nonce, str) or len(nonce) != 64:
        raise ProtocolError("the other side sent no nonce")
    return nonce


@dataclass
class AgentConnection:
    """The controller's end of the connection to one agent."""

    channel: Channel
    host: str
    pid: int
    agent: str
    """Which agent it is, as its placer named it: placers sort by it before ranks are given out."""


def keep_alive(agents: Sequence[AgentConnection], timeout_s: float) -> None:
    """Wait for `timeout_s`, speaking to agents that have nothing to do, and hearing what they say.

    Raises:
        PeerLost, ProtocolError: One is lost.
    """
    with selectors.DefaultSelector() as selector:
        for agent in agents:
            selector.register(agent.channel, selectors.EVENT_READ, agent)
        deadline = time.monotonic() + timeout_s
        while True:
            for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                key.data.channel.receive()
            if time.monotonic() >= deadline:
                break
    for agent in agents:
        agent.channel.keep_alive()


class _Guest(NamedTuple):
    """A connection that has not proved itself yet."""

    channel: Channel
    nonce: str
    deadline: float


class Listener:
    """Where agents connect: a TCP port on `host` that lets in only those that hold the token.

    Many may greet at the same time: one that is slow, or a stranger that says nothing, keeps no other waiting.
    """

    def __init__(self, token: str, host: str = "127.0.0.1", silence_s: float = SILENCE_S) -> None:
        self._token = token
        self._silence_s = silence_s
        self._socket = socket.create_server((host, 0), backlog=BACKLOG)
        self._socket.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._guests: dict[int, _Guest] = {}

    @property
    def address(self) -> str:
        """ "HOST:PORT", as BIGTRAIN_CONTROLLER takes it."""
        host, port = self._socket.getsockname()[:2]
        return f"{host}:{port}"

    def close(self) -> None:
        """Stop listening, and turn away who has not proved itself; connections stay."""
        for descriptor in list(self._guests):
            self._dismiss(descriptor).channel.close()
        self._selector.close()
        self._socket.close()

    def accept(self, timeout_s: float, refused: Callable[[str], None] | None = None) -> AgentConnection | None:
        """The next agent that proves itself within `timeout_s`, or None.

        Strangers are turned away, and `refused` is called with the reason.
        """
        deadline = time.monotonic() + timeout_s
        while (now := time.monotonic()) < deadline:
            until = min([deadline, *(guest.deadline for guest in self._guests.values())])
            for key, _ in self._selector.select(max(0.0, until - now)):
                if key.fileobj is self._socket:
                    self._welcome_in()
                    continue
                guest = self._guests[key.fd]
                try:
                    agent = self._greet(guest)
                except (ProtocolError, PeerLost) as error:
                    self._turn_away(key.fd, str(error), refused)
                    continue
                if agent is not None:
                    self._dismiss(key.fd)
                    return agent
            now = time.monotonic()
            for descriptor in [number for number, guest in self._guests.items() if guest.deadline <= now]:
                self._turn_away(descriptor, f"no hello within {GREETING_TIMEOUT_S:.0f} s", refused)
        return None

    def _welcome_in(self) -> None:
        """Challenge who has connected."""
        with contextlib.suppress(OSError, PeerLost):  # It has gone away again.
            connection, _ = self._socket.accept()
            channel = Channel(connection, "controller")
            nonce = secrets.token_hex(32)
            channel.send("challenge", version=VERSION, nonce=nonce)
            self._guests[channel.fileno()] = _Guest(channel, nonce, time.monotonic() + GREETING_TIMEOUT_S)
            self._selector.register(channel, selectors.EVENT_READ)

    def _dismiss(self, descriptor: int) -> _Guest:
        self._selector.unregister(descriptor)
        return self._guests.pop(descriptor)

    def _turn_away(self, descriptor: int, why: str, refused: Callable[[str], None] | None) -> None:
        self._dismiss(descriptor).channel.close()
        if refused is not None:
            refused(why)

    def _greet(self, guest: _Guest) -> AgentConnection | None:
        """Read on in a guest's hello; the agent, once that has proved it to be one."""
        channel, nonce = guest.channel, guest.nonce
        hello = channel.hear("hello")
        if hello is None:
            return None
        peer_nonce = _check_version(hello)
        _check_proof(hello, _keyed(self._token, "agent", nonce, peer_nonce))
        proof = _keyed(self._token, "controller", nonce, peer_nonce).hex()
        channel.send("welcome", proof=proof, silence_s=self._silence_s)
        channel.secure(_keyed(self._token, "session", nonce, peer_nonce), self._silence_s)
        return AgentConnection(
            channel, str(hello.get("host", "?")), int(hello.get("pid", 0)), str(hello.get("agent", ""))
        )


def connect(address: str, token: str, agent: str = "") -> Channel:
    """Connect to the controller and greet it, as an agent.

    Args:
        address: "HOST:PORT".
        token: The run's token.
        agent: The name that the placer gave to this agent.

    Raises:
        PeerLost: Nobody listens there.
        ProtocolError: Who listens there does not hold the token.
    """
    host, _, port = address.rpartition(":")
    try:
        connection = socket.create_connection((host, int(port)), timeout=GREETING_TIMEOUT_S)
    except OSError as error:
        raise PeerLost(f"no controller answers at {address}: {error}") from error
    channel = Channel(connection, "agent")
    try:
        peer_nonce = _check_version(channel.greeting("challenge"))
        nonce = secrets.token_hex(32)
        channel.send(
            "hello",
            version=VERSION,
            nonce=nonce,
            proof=_keyed(token, "agent", peer_nonce, nonce).hex(),
            agent=agent,
            host=socket.gethostname(),
            pid=os.getpid(),
            cores=len(os.sched_getaffinity(0)),
        )
        welcome = channel.greeting("welcome")
        _check_proof(welcome, _keyed(token, "controller", peer_nonce, nonce))
        channel.secure(_keyed(token, "session", peer_nonce, nonce), float(welcome.get("silence_s", SILENCE_S)))
    except BaseException:
        with contextlib.suppress(OSError):
            channel.close()
        raise
    return channel

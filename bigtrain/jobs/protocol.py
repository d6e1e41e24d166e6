"""The protocol between agents and the controller: authenticated JSON frames over TCP.

**Frames.** A frame is a length (4 bytes, big-endian: the number of bytes that follow), an authentication code (32
bytes, HMAC-SHA256) and one JSON object in UTF-8. Code and object together are at most MAX_FRAME_BYTES long, and at
most MAX_GREETING_BYTES until both sides are authenticated. The connection ends on a longer frame, on a wrong code,
and on a payload that is not an object with a string under "type".

**Greeting.** The agent connects. Both sides hold the run's token. The agent gets it from its environment
(BIGTRAIN_JOB_TOKEN); the token is never sent in an argument list, a file or this connection.

    controller -> agent   challenge  {version, nonce}
    agent -> controller   hello      {version, nonce, proof, agent, host, pid, cores}   proof = H("agent", both nonces)
    controller -> agent   welcome    {proof, silence_s}                             proof = H("controller", both nonces)

H is HMAC-SHA256 with the token as key. The two proofs differ in their first word, so neither can be reflected; the
nonces are fresh, so neither can be replayed. Both sides refuse another version. Frames of the greeting have a code of
32 zero bytes. The code of each later frame is the HMAC-SHA256 of the sender's role, the frame's number in its
direction and its payload, with the session's key, H("session", both nonces). So a frame cannot be altered, repeated,
dropped or reordered. Nothing is encrypted: outside a private network, use a tunnel. For the same reason no secret is
sent; ranks inherit secrets from the agent's environment.

**Messages** after the greeting. A generation is one start of all ranks; messages about an older one are ignored.

    both directions       beat     {} every BEAT_S; the agent's: {generation, ranks: {rank: [step, phase, age_s]}}
    controller -> agent   port     {}                    requests a free TCP port of the agent's machine
    agent -> controller   port     {port}
    controller -> agent   place    {generation, module, arguments, environment, defaults, logs, limits, first_rank,
                                    procs, world_size, node_rank, master_address, master_port}: start these ranks
    agent -> controller   started  {generation, pids: {rank: pid}}
    controller -> agent   control  {word}                0 run, 1 stop, 2 save: written to every rank's heartbeat page
    controller -> agent   kill     {generation}          end all ranks now
    agent -> controller   exited   {generation, rank, code, signal, step, phase, ended, traceback, tail}
                                    code: null if a signal ended the rank; ended: whether the agent killed the rank
    agent -> controller   overdue  {generation}          a rank is silent for longer than its limit; `hung` follows
    controller -> agent   examine  {generation}          a rank of another node is overdue: report on your ranks
    agent -> controller   hung     {generation, rank, step, phase, age_s, limit_s, stopped, answered, stacks}
                                    the rank of this node that most likely hangs; answered: it wrote its state
    agent -> controller   ended    {generation}          no process of the generation is left on this machine
    agent -> controller   notice   {signal}              the agent was asked to stop: the run should save and stop
    controller -> agent   done     {}                    end all ranks and exit

**Silence.** A side that receives nothing for `silence_s` (10 s), or sees the connection close, counts the other side as
dead. The agent then ends its ranks and exits; the controller has its placer remove the agent.

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
"""Number of connections that may wait to be accepted."""
SEND_TIMEOUT_S: Final = 5.0

_CODE_BYTES: Final = 32
_NO_CODE: Final = bytes(_CODE_BYTES)

Message = dict[str, Any]
Role = Literal["agent", "controller"]


class ProtocolError(Exception):
    """The other side violated the protocol or failed the authentication."""


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

    A channel must be used by one thread only. Sending blocks for at most SEND_TIMEOUT_S seconds; receiving returns
    the messages that have arrived.
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
        """The socket's file descriptor, for a selector."""
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
        """End the greeting: from now on the frames' codes are computed with `key`."""
        self._key, self.silence_s = key, silence_s
        self._sent = self._received = 0
        self._connection.settimeout(SEND_TIMEOUT_S)

    def send(self, type: str, **fields: Any) -> None:
        """Send one message.

        Raises:
            PeerLost: The connection is closed, or the message could not be sent within SEND_TIMEOUT_S.
            ProtocolError: The message is longer than MAX_FRAME_BYTES.
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
        """Return the messages that have arrived.

        The call waits for the first bytes, so call it when the descriptor is readable.

        Raises:
            PeerLost: The peer closed the connection.
            ProtocolError: The peer violated the protocol.
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
        """Send a beat if the last message was sent BEAT_S ago, and check that the peer is alive.

        Raises:
            PeerLost: Nothing was received from the peer for `silence_s`.
        """
        now = time.monotonic()
        if now - self._heard > self.silence_s:
            raise PeerLost(f"nothing was heard for {now - self._heard:.0f} s")
        if now - self._spoke >= min(BEAT_S, self.silence_s / 4):
            self.send("beat", **fields)

    def greeting(self, type: str) -> Message:
        """Wait for one message of the greeting; the bytes after it are left for `receive`."""
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
        """Read the available bytes of one message of the greeting; returns None while the message is incomplete.

        Raises:
            TimeoutError: No bytes arrived within the socket's timeout.
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
        """Bytes still missing from the buffer's first frame, or from its 4-byte length while that is incomplete."""
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
    # compare_digest does not accept non-ASCII text, so compare bytes.
    if not isinstance(proof, str) or not hmac.compare_digest(proof.encode(), expected.hex().encode()):
        raise ProtocolError("the peer does not have the run's token")


def _check_version(message: Message) -> str:
    if message.get("version") != VERSION:
        raise ProtocolError(f"the peer has protocol version {message.get('version')!r}, but this process has {VERSION}")
    nonce = message.get("nonce")
    if not isinstance(nonce, str) or len(nonce) != 64:
        raise ProtocolError("the peer sent no nonce")
    return nonce


@dataclass
class AgentConnection:
    """The controller's end of the connection to one agent."""

    channel: Channel
    host: str
    pid: int
    agent: str
    """Name of the agent, given by its placer; placers order agents by it before ranks are assigned."""


def keep_alive(agents: Sequence[AgentConnection], timeout_s: float) -> None:
    """Wait for `timeout_s` seconds, and meanwhile keep the connections to idle agents alive.

    Raises:
        PeerLost: An agent is lost.
        ProtocolError: An agent violated the protocol.
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
    """A connection whose peer is not authenticated yet."""

    channel: Channel
    nonce: str
    deadline: float


class Listener:
    """A TCP port on `host` that accepts agents, and only those that hold the token.

    Many agents may greet at the same time: a slow agent, or a stranger that sends nothing, does not delay the others.
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
        """The address as "HOST:PORT", the format of BIGTRAIN_CONTROLLER."""
        host, port = self._socket.getsockname()[:2]
        return f"{host}:{port}"

    def close(self) -> None:
        """Stop listening, and close connections whose peer is not authenticated; accepted agents stay connected."""
        for descriptor in list(self._guests):
            self._dismiss(descriptor).channel.close()
        self._selector.close()
        self._socket.close()

    def accept(self, timeout_s: float, refused: Callable[[str], None] | None = None) -> AgentConnection | None:
        """Return the next agent that authenticates itself within `timeout_s` seconds, or None.

        A connection that fails the authentication is closed, and `refused` is called with the reason.
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
        """Accept a new connection and send it a challenge."""
        with contextlib.suppress(OSError, PeerLost):  # The peer has closed the connection again.
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
        """Read more of a guest's `hello`; returns the agent once the `hello` is complete and its proof is right."""
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
        address: The controller's address as "HOST:PORT".
        token: The run's token.
        agent: The name that the placer gave to this agent.

    Raises:
        PeerLost: No process listens at `address`, or it closed the connection.
        ProtocolError: The listening process does not hold the token, or does not speak this protocol.
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

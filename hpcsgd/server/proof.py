"""Mutual proof of a job's secret, and the start of encryption, on a new connection.

Nothing is parsed of a peer that has not proved the secret: all messages here have a fixed size. The server
sends a challenge, the client its own and a proof, and the server its proof, each the HMAC of both challenges
under the secret. Where the link is encrypted TLS follows, and a second proof of the client inside of it: the
first one could have been passed on by somebody between the two, who does not have the server's certificate.

Both sides are generators, which never block: they yield the event of `selectors` that they wait for.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import selectors
import socket
import ssl
from collections.abc import Callable, Generator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from hpcsgd.server.protocol import Disconnected, ProtocolError, connection_broke

#: Returns the connection once both sides have proved the secret; raises `Disconnected`.
Greeting = Generator[int, None, socket.socket]

_MAGIC = b"hpcsgd2\n"  # and the version of the protocol
_NONCE_BYTES = _PROOF_BYTES = _PLACE_BYTES = 32
_WANT_BYTES = 1 + _PLACE_BYTES  # whether this side wants TLS, and where it is
_CHALLENGE_BYTES = len(_MAGIC) + _WANT_BYTES + _NONCE_BYTES
_ANSWER_BYTES = _WANT_BYTES + _NONCE_BYTES + _PROOF_BYTES
_REFUSED = bytes(_PROOF_BYTES)  # in the place of the server's proof
_T = TypeVar("_T")


class ServerIdentity(NamedTuple):
    """Secret and certificate of a server, with which it greets clients."""

    secret: str
    context: ssl.SSLContext | None = None  # TLS with the server's certificate; None: no link is encrypted
    always: bool = False  # whether links inside of one host are encrypted too


class SecretError(ProtocolError):
    """One side does not have the other's secret."""


def new_secret() -> str:
    """Random secret, as hexadecimal text."""
    return secrets.token_hex(_NONCE_BYTES)


def greet_client(connection: socket.socket, identity: ServerIdentity) -> Greeting:
    """Server's side of a non-blocking connection, which is closed if the greeting fails."""
    try:
        _send_at_once(connection)
        wanted = identity.context is not None and (identity.always or not _is_local(connection))
        challenge = _MAGIC + bytes([wanted]) + _place() + secrets.token_bytes(_NONCE_BYTES)
        _send(connection, challenge)
        answer = yield from _receive(connection, _ANSWER_BYTES)
        transcript, proof = challenge + answer[:-_PROOF_BYTES], answer[-_PROOF_BYTES:]
        if not hmac.compare_digest(proof, _hmac(identity.secret, b"client", transcript)):
            _send(connection, _REFUSED)
            raise SecretError("the client does not have the secret of this job")
        _send(connection, _hmac(identity.secret, b"server", transcript))
        if not wanted and not answer[0]:
            return connection
        if identity.context is None:
            raise ProtocolError("the client wants encryption, which this server does not have (--no-tls)")
        connection = identity.context.wrap_socket(connection, True, do_handshake_on_connect=False)
        yield from _until_done(connection.do_handshake)
        proof = yield from _receive(connection, _PROOF_BYTES)
        if not hmac.compare_digest(proof, _hmac(identity.secret, b"client inside TLS", transcript)):
            raise SecretError("the client does not have the secret of this job")
        return connection
    except OSError as error:
        connection.close()
        raise connection_broke(error) from None
    except BaseException:
        connection.close()
        raise


def greet_server(connection: socket.socket, secret: str, fingerprint: str) -> Greeting:
    """Client's side; a server with a certificate's fingerprint is one that encrypts."""
    try:
        _send_at_once(connection)
        challenge = yield from _receive(connection, _CHALLENGE_BYTES)
        if not challenge.startswith(_MAGIC):
            raise ProtocolError("received bytes that are no greeting of hpcsgd")
        server_wants, place = bool(challenge[len(_MAGIC)]), challenge[len(_MAGIC) + 1 :][:_PLACE_BYTES]
        if server_wants and not fingerprint:
            raise ProtocolError("the server wants encryption, and its file has no certificate")
        # Two ends that each see a local one may be those of a relay: the place is under both proofs.
        wanted = bool(fingerprint) and (server_wants or place != _place() or not _is_local(connection))
        own = bytes([wanted]) + _place() + secrets.token_bytes(_NONCE_BYTES)
        transcript = challenge + own
        _send(connection, own + _hmac(secret, b"client", transcript))
        proof = yield from _receive(connection, _PROOF_BYTES)
        if proof == _REFUSED:
            raise SecretError("this client does not have the secret of the server's job")
        if not hmac.compare_digest(proof, _hmac(secret, b"server", transcript)):
            raise SecretError("the server does not have the secret of this job")
        if not wanted:
            return connection
        connection = _client_context().wrap_socket(connection, do_handshake_on_connect=False)
        yield from _until_done(connection.do_handshake)
        if hashlib.sha256(connection.getpeercert(True) or b"").hexdigest() != fingerprint:
            raise SecretError("the server does not have the certificate of this job")
        _send(connection, _hmac(secret, b"client inside TLS", transcript))
        return connection
    except OSError as error:
        connection.close()
        raise connection_broke(error) from None
    except BaseException:
        connection.close()
        raise


def _client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # The rendezvous file names this one certificate by its fingerprint: no authority has signed it.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@cache
def _place() -> bytes:
    """Hash of this host's present start and network namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return hashlib.sha256(boot + str(os.stat("/proc/self/ns/net").st_ino).encode()).digest()


def _is_local(connection: socket.socket) -> bool:
    """Whether both ends of this connection, but perhaps not of a link over a relay, are on one host."""
    own, peer = connection.getsockname()[0], connection.getpeername()[0]
    return bool(own == peer)


def _hmac(secret: str, label: bytes, transcript: bytes) -> bytes:
    """Proof of the secret; the label names the prover, so that nobody can be made to prove for another."""
    return hmac.digest(secret.encode(), label + b"\0" + transcript, "sha256")


def _send_at_once(connection: socket.socket) -> None:
    """Let no short message wait for the acknowledgement of the one before: with TLS that takes 40 ms."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _send(connection: socket.socket, data: bytes) -> None:
    """Send a message that always fits into the buffer of a new connection."""
    if connection.send(data) != len(data):
        raise Disconnected("the connection does not take a short message")


def _receive(connection: socket.socket, nbytes: int) -> Generator[int, None, bytes]:
    received = b""
    while len(received) < nbytes:
        part = yield from _until_done(partial(connection.recv, nbytes - len(received)))
        if not part:
            raise Disconnected("the other side closed the connection")
        received += part
    return received


def _until_done(operation: Callable[[], _T]) -> Generator[int, None, _T]:
    """Result of an operation on a non-blocking socket."""
    while True:
        try:
            return operation()
        except (BlockingIOError, ssl.SSLWantReadError):
            yield selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            yield selectors.EVENT_WRITE

#!/usr/bin/env python3
"""An HTTP/3 client that prints what it saw as JSON.

    h3.py URL [--connect IP:PORT] [--ca PEM] [--method M] [--header 'k: v']...
              [--data STR | --data-file F] [--output F] [--parallel N] [--timeout S]
              [--raw-headers JSON] [--abort-after BYTES | --fin-after BYTES]

A response prints
    {"status", "headers", "trailers", "interim", "body_sha256", "body_len", "body", "protocol"}
where `body` is null when it is over 64 KiB or not UTF-8. Anything else prints
    {"error", "stream_reset_code", "stop_sending_code", "connection_close_code",
     "connection_close_layer", "connection_closed_by", "status", "body_len"}
and the exit code is 1. With --parallel the answers come as an array, and one error makes
the exit code 1. Usage errors exit with 2.

--raw-headers replaces the whole header list, pseudo headers included; nothing is added to it.
--abort-after and --fin-after promise the length of --data (or BYTES + 1000, when there is no
data) and send only BYTES of it: the first then resets the stream, the second ends it.
"""

import argparse
import asyncio
import hashlib
import json
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3_ALPN, ErrorCode, H3Connection
from aioquic.h3.events import DataReceived, H3Event, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import (
    ConnectionTerminated,
    HandshakeCompleted,
    QuicEvent,
    StopSendingReceived,
    StreamReset,
)

BODY_SHOWN_MAX = 64 * 1024
DATA_FRAME_SIZE = 64 * 1024

# What the QPACK encoder takes; it refuses empty names, too.
QPACK_STRING_MAX = 65535

# How much more is promised than sent when the caller gave no data to cut short.
BROKEN_BODY_SHORTFALL = 1000

# After resetting its stream the client still listens this long for an answer.
ABORT_GRACE = 1.0

Headers = list[tuple[bytes, bytes]]


class Failure(Exception):
    """Why a request got no response, with the codes seen on the wire."""

    def __init__(self, message: str, **codes: int | str | None) -> None:
        super().__init__(message)
        self.codes = codes


@dataclass
class Plan:
    """One request as it goes on the wire."""

    headers: Headers
    body: bytes
    sent_len: int
    abort: bool


@dataclass
class Exchange:
    """What came back for one request so far."""

    done: asyncio.Future[None]
    output: BinaryIO | None
    status: int | None = None
    interim: list[int] = field(default_factory=list)
    headers: list[list[str]] = field(default_factory=list)
    trailers: list[list[str]] = field(default_factory=list)
    stop_sending_code: int | None = None
    body_len: int = 0
    body_start: bytearray = field(default_factory=bytearray)
    body_hash: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def on_headers(self, headers: Headers) -> None:
        fields = [[k.decode("latin-1"), v.decode("latin-1")] for k, v in headers]
        if self.status is not None:
            self.trailers += fields
            return
        status = int(dict(headers)[b":status"])
        if status < 200:
            self.interim.append(status)
            return
        self.status = status
        self.headers = [pair for pair in fields if not pair[0].startswith(":")]

    def on_data(self, data: bytes) -> None:
        self.body_len += len(data)
        self.body_hash.update(data)
        if len(self.body_start) <= BODY_SHOWN_MAX:
            self.body_start += data
        if self.output is not None:
            self.output.write(data)

    def on_end(self) -> None:
        if self.done.done():
            return
        if self.status is None:
            self.done.set_exception(Failure("the stream ended without a response"))
        else:
            self.done.set_result(None)

    def fail(self, failure: Failure) -> None:
        if not self.done.done():
            self.done.set_exception(failure)

    def response(self) -> dict:
        return {
            "status": self.status,
            "headers": self.headers,
            "trailers": self.trailers,
            "interim": self.interim,
            "body_sha256": self.body_hash.hexdigest(),
            "body_len": self.body_len,
            "body": self.body_text(),
            "protocol": "h3",
        }

    def body_text(self) -> str | None:
        if self.body_len > BODY_SHOWN_MAX:
            return None
        try:
            return self.body_start.decode()
        except UnicodeDecodeError:
            return None

    def error(self, failure: Failure) -> dict:
        return {
            "error": str(failure),
            "stream_reset_code": None,
            "stop_sending_code": self.stop_sending_code,
            "connection_close_code": None,
            "connection_close_layer": None,
            "connection_closed_by": None,
            "status": self.status,
            "body_len": self.body_len,
            **failure.codes,
        }


class Connection(QuicConnection):
    """A QUIC connection that remembers whether the first close was ours."""

    closed_here = False

    def close(self, *args, **kwargs) -> None:
        self.closed_here = self.closed_here or self._close_event is None
        super().close(*args, **kwargs)


class Client(QuicConnectionProtocol):
    """One HTTP/3 connection and its requests."""

    def __init__(self, quic: Connection) -> None:
        super().__init__(quic)
        self.http = H3Connection(quic)
        self.exchanges: dict[int, Exchange] = {}
        self.handshake: asyncio.Future[None] = self._loop.create_future()
        self.failure: Failure | None = None

    def open(self, plan: Plan, exchange: Exchange) -> int:
        """Sends the request, as far as flow control lets it; the rest follows by itself."""
        stream_id = self._quic.get_next_available_stream_id()
        self.exchanges[stream_id] = exchange
        if self.failure is not None:
            exchange.fail(self.failure)
            return stream_id
        body = memoryview(plan.body)[: plan.sent_len]
        fin = not plan.abort
        self.http.send_headers(stream_id, plan.headers, end_stream=fin and not body)
        for start in range(0, len(body), DATA_FRAME_SIZE):
            frame = bytes(body[start : start + DATA_FRAME_SIZE])
            last = start + len(frame) == len(body)
            self.http.send_data(stream_id, frame, end_stream=fin and last)
        self.transmit()
        return stream_id

    async def reset_once_delivered(self, stream_id: int) -> None:
        """Resets the stream when the peer has acknowledged everything sent on it.

        A reset drops what is still unsent, and aioquic tells nobody when that is nothing;
        hence the look into its sender.
        """
        sender = self._quic._streams[stream_id].sender
        while sender._buffer_start < sender._buffer_stop:
            if self.exchanges[stream_id].done.done() or sender._reset_error_code is not None:
                return
            await asyncio.sleep(0.005)
        self._quic.reset_stream(stream_id, ErrorCode.H3_REQUEST_CANCELLED)
        self.transmit()

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, HandshakeCompleted):
            self.handshake.set_result(None)
        elif isinstance(event, ConnectionTerminated):
            self.fail_all(self.closed(event))
        elif isinstance(event, StreamReset) and event.stream_id in self.exchanges:
            code = event.error_code
            failure = Failure(f"stream reset by the server: {code:#x}", stream_reset_code=code)
            self.exchanges[event.stream_id].fail(failure)
        elif isinstance(event, StopSendingReceived) and event.stream_id in self.exchanges:
            self.exchanges[event.stream_id].stop_sending_code = event.error_code
        for http_event in self.http.handle_event(event):
            self.http_event_received(http_event)

    def http_event_received(self, event: H3Event) -> None:
        if not isinstance(event, (HeadersReceived, DataReceived)):
            return
        exchange = self.exchanges.get(event.stream_id)
        if exchange is None:
            return
        if isinstance(event, HeadersReceived):
            exchange.on_headers(event.headers)
        else:
            exchange.on_data(event.data)
        if event.stream_ended:
            exchange.on_end()

    def closed(self, event: ConnectionTerminated) -> Failure:
        if event.reason_phrase == "Idle timeout":
            return Failure("connection timed out: nothing came from the server")
        by = "client" if self._quic.closed_here else "server"
        layer = "application" if event.frame_type is None else "transport"
        return Failure(
            f"connection closed by the {by}: {event.error_code:#x} {event.reason_phrase}".strip(),
            connection_close_code=event.error_code,
            connection_close_layer=layer,
            connection_closed_by=by,
        )

    def error_received(self, exc: Exception) -> None:
        self.fail_all(Failure(f"no server at this address: {exc}"))

    def fail_all(self, failure: Failure) -> None:
        self.failure = self.failure or failure
        if not self.handshake.done():
            self.handshake.set_exception(failure)
        for exchange in self.exchanges.values():
            exchange.fail(failure)


def encode_headers(pairs: list[tuple[str, str]]) -> Headers:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs]


def raw_headers(text: str) -> Headers:
    try:
        return encode_headers(json.loads(text))
    except (AttributeError, TypeError) as error:
        raise ValueError("not an array of [name, value]") from error


def parse_args() -> tuple[argparse.Namespace, Plan]:
    parser = argparse.ArgumentParser(description="HTTP/3 client for tests, JSON on stdout")
    parser.add_argument("url", metavar="URL")
    parser.add_argument("--method", help="default: GET, or POST when there is a body")
    parser.add_argument("--header", action="append", default=[], metavar="'k: v'")
    body = parser.add_mutually_exclusive_group()
    body.add_argument("--data", metavar="STR")
    body.add_argument("--data-file", type=Path, metavar="F")
    parser.add_argument("--ca", type=Path, metavar="PEM")
    parser.add_argument("--connect", metavar="IP:PORT", help="instead of the URL's host and port")
    parser.add_argument("--parallel", type=int, metavar="N", help="N requests on one connection")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="S", help="for everything")
    parser.add_argument("--output", type=Path, metavar="F", help="write the body to F")
    parser.add_argument("--raw-headers", type=raw_headers, metavar="JSON", help="[[k, v], ...]")
    cut = parser.add_mutually_exclusive_group()
    cut.add_argument("--abort-after", type=int, metavar="BYTES")
    cut.add_argument("--fin-after", type=int, metavar="BYTES")
    args = parser.parse_args()
    if urlsplit(args.url).scheme != "https" or not urlsplit(args.url).hostname:
        parser.error("URL must be https://HOST[:PORT]/PATH")
    if args.parallel and args.output:
        parser.error("--output takes one response; leave out --parallel")
    if any(":" not in header for header in args.header):
        parser.error("--header must look like 'name: value'")
    try:
        return args, plan_request(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def plan_request(args: argparse.Namespace) -> Plan:
    body = args.data_file.read_bytes() if args.data_file else (args.data or "").encode()
    has_data = args.data is not None or args.data_file is not None
    cut = args.abort_after if args.abort_after is not None else args.fin_after
    if cut is not None and not has_data:
        body, has_data = b"x" * (cut + BROKEN_BODY_SHORTFALL), True
    sent_len = len(body) if cut is None else cut
    if sent_len > len(body):
        raise ValueError("--abort-after and --fin-after must lie within the data")

    if args.raw_headers is not None:
        headers = args.raw_headers
    else:
        headers = compose_headers(args, len(body) if has_data else None)
    if any(not name or max(len(name), len(value)) > QPACK_STRING_MAX for name, value in headers):
        raise ValueError(f"a header's name is empty, or a part is over {QPACK_STRING_MAX} bytes")
    return Plan(headers, body, sent_len, abort=args.abort_after is not None)


def compose_headers(args: argparse.Namespace, body_len: int | None) -> Headers:
    url = urlsplit(args.url)
    path = url.path or "/"
    if url.query:
        path += "?" + url.query
    method = args.method or ("GET" if body_len is None else "POST")
    headers = [
        (":method", method),
        (":scheme", "https"),
        (":authority", url.netloc.rpartition("@")[2]),
        (":path", path),
    ]
    for header in args.header:
        name, _, value = header.partition(":")
        headers.append((name.strip().lower(), value.strip()))
    if body_len is not None and "content-length" not in dict(headers):
        headers.append(("content-length", str(body_len)))
    return encode_headers(headers)


def server_address(args: argparse.Namespace) -> tuple[str, int]:
    if args.connect:
        host, _, port = args.connect.rpartition(":")
        return host.strip("[]"), int(port)
    url = urlsplit(args.url)
    return url.hostname, url.port or 443


async def connect(args: argparse.Namespace) -> Client:
    """Starts the handshake and returns at once.

    The UDP socket is a connected one, so that a port where nobody listens is an error and
    not a time-out.
    """
    loop = asyncio.get_running_loop()
    host, port = server_address(args)
    config = QuicConfiguration(
        alpn_protocols=H3_ALPN,
        server_name=urlsplit(args.url).hostname,
        idle_timeout=args.timeout,
    )
    if args.ca:
        config.load_verify_locations(cafile=str(args.ca))
    family, _, _, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM))[0]
    quic = Connection(configuration=config)
    _, client = await loop.create_datagram_endpoint(
        lambda: Client(quic), family=family, remote_addr=address[:2]
    )
    client.connect(address)
    return client


async def fetch(client: Client, plan: Plan, output: BinaryIO | None, deadline: float) -> dict:
    exchange = Exchange(asyncio.get_running_loop().create_future(), output)
    try:
        async with asyncio.timeout_at(deadline):
            await asyncio.shield(client.handshake)
            stream_id = client.open(plan, exchange)
            if plan.abort:
                await client.reset_once_delivered(stream_id)
                await listen_after_abort(exchange)
            await exchange.done
        return exchange.response()
    except TimeoutError:
        return exchange.error(Failure("timed out"))
    except Failure as failure:
        return exchange.error(failure)


async def listen_after_abort(exchange: Exchange) -> None:
    await asyncio.wait([exchange.done], timeout=ABORT_GRACE)
    exchange.fail(Failure("aborted by this client, and the server did not answer"))


async def run(args: argparse.Namespace, plan: Plan) -> list[dict]:
    deadline = asyncio.get_running_loop().time() + args.timeout
    output = args.output.open("wb") if args.output else None
    client = await connect(args)
    try:
        fetches = [fetch(client, plan, output, deadline) for _ in range(args.parallel or 1)]
        return await asyncio.gather(*fetches)
    finally:
        client.close(ErrorCode.H3_NO_ERROR)
        client._transport.close()
        if output:
            output.close()


def main() -> int:
    args, plan = parse_args()
    results = asyncio.run(run(args, plan))
    print(json.dumps(results if args.parallel else results[0]))
    return 1 if any("error" in result for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())

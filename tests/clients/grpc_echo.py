#!/usr/bin/env python3
"""A gRPC echo service and the client that checks it, both cleartext (h2c).

    grpc_echo.py serve --port P [--host IP] [--lifetime S] [--connection-age-ms MS]
        prints `ready` when it listens; one line a call on stderr, and one for each that was cancelled
    grpc_echo.py call --target IP:PORT [--authority NAME] [--timeout S]
                      [--only unary|server-stream|client-stream|bidi|fail|deadline|cancel|many|all]
        prints one JSON object, an entry a method; exit code 1 on any mismatch

Messages are plain bytes, without protobuf. Methods of /echo.Echo: Unary returns the message
and the trailer `x-trailer: served`; ServerStream takes a decimal count n and streams `msg-0`
to `msg-<n-1>`; ClientStream returns how many messages and bytes came; Bidi echoes each
message as it comes; Fail ends with RESOURCE_EXHAUSTED and the details "no more"; Left returns
how many seconds its caller still waits, as the server is told; Hang never ends by itself, nor
does Stall, which streams `begun` before.
"""

import argparse
import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

SERVICE = "echo.Echo"
TRAILER = ("x-trailer", "served")
FAIL_DETAILS = "no more"

STREAM_COUNT = 100
BIDI_ROUNDS = 20

# Over every default flow control window, and as large as grpc's own limit for a message lets.
LARGE_MESSAGE = bytes(range(256)) * 16384

# How long a call waits that is to be given up, in seconds.
SHORT = 1.0

# For how long calls are made one after the other, over whatever becomes of connections.
MANY_FOR = 3.0

CHANNEL_OPTIONS = [
    # Never through a proxy named in the environment: the peer under test is on this machine.
    ("grpc.enable_http_proxy", 0),
    # Pings, as clients behind firewalls send them, also while nothing is under way.
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


def unary(request: bytes, context: grpc.ServicerContext) -> bytes:
    context.set_trailing_metadata((TRAILER,))
    return request


def server_stream(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    for i in range(int(request)):
        yield b"msg-%d" % i


def client_stream(requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
    sizes = [len(message) for message in requests]
    return b"%d %d" % (len(sizes), sum(sizes))


def left(request: bytes, context: grpc.ServicerContext) -> bytes:
    return str(context.time_remaining()).encode()


def wait_for_end(context: grpc.ServicerContext) -> None:
    ended = threading.Event()
    context.add_callback(ended.set)
    ended.wait(60)


def hang(request: bytes, context: grpc.ServicerContext) -> bytes:
    wait_for_end(context)
    print("ended Hang", file=sys.stderr, flush=True)
    return b""


def stall(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    yield b"begun"
    wait_for_end(context)


def bidi(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from requests


def fail(request: bytes, context: grpc.ServicerContext) -> bytes:
    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, FAIL_DETAILS)


# Without serializers grpc hands over the bytes as they are.
HANDLERS = {
    "Unary": grpc.unary_unary_rpc_method_handler(unary),
    "ServerStream": grpc.unary_stream_rpc_method_handler(server_stream),
    "ClientStream": grpc.stream_unary_rpc_method_handler(client_stream),
    "Left": grpc.unary_unary_rpc_method_handler(left),
    "Hang": grpc.unary_unary_rpc_method_handler(hang),
    "Stall": grpc.unary_stream_rpc_method_handler(stall),
    "Bidi": grpc.stream_stream_rpc_method_handler(bidi),
    "Fail": grpc.unary_unary_rpc_method_handler(fail),
}


class CallLog(grpc.ServerInterceptor):
    """Says on stderr which method was called, so that a test can count attempts."""

    def intercept_service(self, continuation, details):
        print(f"call {details.method}", file=sys.stderr, flush=True)
        return continuation(details)


def serve(args: argparse.Namespace) -> int:
    options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", len(LARGE_MESSAGE))]
    if args.connection_age_ms:
        options.append(("grpc.max_connection_age_ms", args.connection_age_ms))
        options.append(("grpc.max_connection_age_grace_ms", 2000))
    server = grpc.server(
        ThreadPoolExecutor(max_workers=32),
        handlers=[grpc.method_handlers_generic_handler(SERVICE, HANDLERS)],
        interceptors=[CallLog()],
        options=options,
    )
    server.add_insecure_port(f"{args.host}:{args.port}")
    server.start()
    print("ready", flush=True)
    server.wait_for_termination(timeout=args.lifetime)
    return 0


def expect(what: str, got: object, wanted: object) -> None:
    if got != wanted:
        raise AssertionError(f"{what}: got {got!r}, wanted {wanted!r}")


def check_unary(channel: grpc.Channel, timeout: float) -> dict:
    method = channel.unary_unary(f"/{SERVICE}/Unary")
    for message in (b"hello", b"", LARGE_MESSAGE):
        reply, call = method.with_call(message, timeout=timeout)
        expect("length of the reply", len(reply), len(message))
        expect("reply is the request", reply == message, True)
        expect("status", call.code(), grpc.StatusCode.OK)
        trailers = [(k, v) for k, v in call.trailing_metadata()]
        expect("trailer in the trailing metadata", TRAILER in trailers, True)
    return {"trailing_metadata": dict(trailers), "largest_message": len(LARGE_MESSAGE)}


def check_server_stream(channel: grpc.Channel, timeout: float) -> dict:
    method = channel.unary_stream(f"/{SERVICE}/ServerStream")
    call = method(b"%d" % STREAM_COUNT, timeout=timeout)
    replies = list(call)
    expect("messages", replies, [b"msg-%d" % i for i in range(STREAM_COUNT)])
    expect("status", call.code(), grpc.StatusCode.OK)
    return {"messages": len(replies)}


def check_client_stream(channel: grpc.Channel, timeout: float) -> dict:
    method = channel.stream_unary(f"/{SERVICE}/ClientStream")
    messages = [b"x" * size for size in (0, 1, 100_000, 1, 0)]
    reply = method(iter(messages), timeout=timeout)
    expect("count and bytes", reply, b"%d %d" % (len(messages), sum(map(len, messages))))
    return {"messages": len(messages)}


def check_deadline(channel: grpc.Channel, timeout: float) -> dict:
    """What the server is told is no more than what its caller waits; and who hangs is given up in time."""
    remaining = float(channel.unary_unary(f"/{SERVICE}/Left")(b"", timeout=timeout))
    # The client itself rounds up what it says, by a hundredth.
    expect(f"{remaining} s, no more than the caller waits", 0 < remaining <= timeout * 1.02, True)
    begun = time.monotonic()
    try:
        channel.unary_unary(f"/{SERVICE}/Hang")(b"", timeout=SHORT)
    except grpc.RpcError as error:
        expect("status", error.code(), grpc.StatusCode.DEADLINE_EXCEEDED)
        took = time.monotonic() - begun
        expect("given up in time", took < timeout, True)
        return {"remaining": remaining, "took": round(took, 2)}
    raise AssertionError("Hang returned a message")


def check_cancel(channel: grpc.Channel, timeout: float) -> dict:
    call = channel.unary_unary(f"/{SERVICE}/Hang").future(b"", timeout=timeout)
    time.sleep(0.3)
    call.cancel()
    try:
        call.result(timeout)
    except grpc.FutureCancelledError:
        return {}
    raise AssertionError("Hang returned a message")


def check_many(channel: grpc.Channel, timeout: float) -> dict:
    """Call after call, over connections that the server ends by their age: not one may fail."""
    method = channel.unary_unary(f"/{SERVICE}/Unary")
    until, calls = time.monotonic() + MANY_FOR, 0
    while time.monotonic() < until:
        expect("reply", method(b"%d" % calls, timeout=timeout), b"%d" % calls)
        calls += 1
    return {"calls": calls}


def check_bidi(channel: grpc.Channel, timeout: float) -> dict:
    """Sends a message only once the one before it came back: a buffering proxy would hang."""
    sending: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    method = channel.stream_stream(f"/{SERVICE}/Bidi")
    call = method(iter(sending.get, None), timeout=timeout)
    slowest = 0.0
    try:
        for i in range(BIDI_ROUNDS):
            message = b"ping-%d" % i
            sent_at = time.monotonic()
            sending.put(message)
            expect(f"echo {i}", next(call), message)
            slowest = max(slowest, time.monotonic() - sent_at)
    finally:
        sending.put(None)
    expect("after the last echo", next(call, "end of stream"), "end of stream")
    expect("status", call.code(), grpc.StatusCode.OK)
    return {"rounds": BIDI_ROUNDS, "slowest_ms": round(slowest * 1000, 1)}


def check_fail(channel: grpc.Channel, timeout: float) -> dict:
    try:
        channel.unary_unary(f"/{SERVICE}/Fail")(b"", timeout=timeout)
    except grpc.RpcError as error:
        expect("status", error.code(), grpc.StatusCode.RESOURCE_EXHAUSTED)
        expect("details", error.details(), FAIL_DETAILS)
        return {"code": error.code().name, "details": error.details()}
    raise AssertionError("Fail returned a message")


CHECKS: dict[str, Callable[[grpc.Channel, float], dict]] = {
    "unary": check_unary,
    "server-stream": check_server_stream,
    "client-stream": check_client_stream,
    "bidi": check_bidi,
    "fail": check_fail,
    "deadline": check_deadline,
    "cancel": check_cancel,
    "many": check_many,
}


def run_check(name: str, channel: grpc.Channel, timeout: float) -> dict:
    try:
        return {"ok": True, **CHECKS[name](channel, timeout)}
    except AssertionError as mismatch:
        return {"ok": False, "error": str(mismatch)}
    except grpc.RpcError as error:
        return {"ok": False, "code": error.code().name, "details": error.details()}


def call(args: argparse.Namespace) -> int:
    names = list(CHECKS) if args.only == "all" else [args.only]
    options = [*CHANNEL_OPTIONS, ("grpc.max_receive_message_length", len(LARGE_MESSAGE))]
    if args.authority:
        options.append(("grpc.default_authority", args.authority))
    with grpc.insecure_channel(args.target, options=options) as channel:
        results = {name: run_check(name, channel, args.timeout) for name in names}
    print(json.dumps(results))
    return 0 if all(result["ok"] for result in results.values()) else 1


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="gRPC echo service and client for tests")
    commands = parser.add_subparsers(required=True)
    server = commands.add_parser("serve")
    server.add_argument("--port", type=int, required=True)
    server.add_argument("--host", default="127.0.0.1")
    server.add_argument("--lifetime", type=float, default=900.0, metavar="S")
    server.add_argument("--connection-age-ms", type=int, metavar="MS")
    server.set_defaults(run=serve)
    client = commands.add_parser("call")
    client.add_argument("--target", required=True, metavar="IP:PORT")
    client.add_argument("--authority", help="default: the target")
    client.add_argument("--only", choices=[*CHECKS, "all"], default="all")
    client.add_argument("--timeout", type=float, default=10.0, metavar="S", help="for each call")
    client.set_defaults(run=call)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    sys.exit(arguments.run(arguments))

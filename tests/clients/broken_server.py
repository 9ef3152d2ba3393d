#!/usr/bin/env python3
"""An HTTP/1.1 server that misbehaves, to stand behind a proxy under test.

    broken_server.py --port P --mode MODE [--host IP] [--lifetime S]

Prints `ready` when it listens, and one line a request on stderr. Modes:

    cut           announces 1,000,000 bytes, sends 1,000, closes
    cut-chunked   sends one chunk and closes, without the last chunk
    reset         reads the request, then closes with RST
    silent        reads the request and never answers
    huge-header   answers with a 200 KB header field
    slow          sends one byte of the body every 100 ms for 20 s
    two-hundred-then-cl-mismatch
                  announces 5 bytes, sends 10, and keeps the connection open for more
    bad-status    answers with a status line that is none
"""

import argparse
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import BinaryIO

# No connection outlives this; it also bounds every read and write.
CONNECTION_TIMEOUT = 60.0

CUT_ANNOUNCED = 1_000_000
CUT_SENT = 1_000
HUGE_HEADER = 200_000
SLOW_INTERVAL = 0.1
SLOW_BYTES = 200


def read_request(stream: BinaryIO) -> str | None:
    """Reads one request with its body and returns its first line; None at the end.

    The body is read because closing with bytes unread would send RST instead of FIN.
    """
    line = stream.readline()
    if not line:
        return None
    fields = {}
    while (field := stream.readline().strip()):
        name, _, value = field.partition(b":")
        fields[name.lower()] = value.strip().lower()
    if fields.get(b"transfer-encoding") == b"chunked":
        while (size := int(stream.readline().split(b";")[0] or b"0", 16)) > 0:
            stream.read(size + 2)
        stream.readline()
    else:
        stream.read(int(fields.get(b"content-length", 0)))
    return line.decode("latin-1").strip()


def head(*fields: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", "content-type: text/plain", *fields]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


# Each mode answers one request and returns whether the connection stays open for the next.


def cut(conn: socket.socket) -> bool:
    conn.sendall(head(f"content-length: {CUT_ANNOUNCED}") + b"x" * CUT_SENT)
    return False


def cut_chunked(conn: socket.socket) -> bool:
    conn.sendall(head("transfer-encoding: chunked") + b"5\r\nhello\r\n")
    return False


def reset(conn: socket.socket) -> bool:
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False


def silent(conn: socket.socket) -> bool:
    return True


def huge_header(conn: socket.socket) -> bool:
    conn.sendall(head("x-huge: " + "h" * HUGE_HEADER, "content-length: 2") + b"ok")
    return True


def slow(conn: socket.socket) -> bool:
    conn.sendall(head(f"content-length: {SLOW_BYTES}"))
    for _ in range(SLOW_BYTES):
        time.sleep(SLOW_INTERVAL)
        conn.sendall(b".")
    return True


def length_mismatch(conn: socket.socket) -> bool:
    conn.sendall(head("content-length: 5") + b"helloEXTRA")
    return True


def bad_status(conn: socket.socket) -> bool:
    conn.sendall(b"HTTP/1.1 two hundred fine\r\ncontent-length: 2\r\n\r\nok")
    return False


MODES: dict[str, Callable[[socket.socket], bool]] = {
    "cut": cut,
    "cut-chunked": cut_chunked,
    "reset": reset,
    "silent": silent,
    "huge-header": huge_header,
    "slow": slow,
    "two-hundred-then-cl-mismatch": length_mismatch,
    "bad-status": bad_status,
}


def handle(conn: socket.socket, answer: Callable[[socket.socket], bool]) -> None:
    conn.settimeout(CONNECTION_TIMEOUT)
    conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        with conn, conn.makefile("rb") as stream:
            while (request := read_request(stream)) is not None:
                print(f"request {request}", file=sys.stderr, flush=True)
                if not answer(conn):
                    return
    except (OSError, ValueError) as error:
        print(f"connection ended: {error}", file=sys.stderr, flush=True)


def serve(args: argparse.Namespace) -> None:
    ends_at = time.monotonic() + args.lifetime
    with socket.create_server((args.host, args.port)) as listener:
        print("ready", flush=True)
        while (left := ends_at - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                conn, _ = listener.accept()
            except TimeoutError:
                return
            threading.Thread(target=handle, args=(conn, MODES[args.mode]), daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description="misbehaving HTTP/1.1 server for tests")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--lifetime", type=float, default=900.0, metavar="S")
    serve(parser.parse_args())


if __name__ == "__main__":
    main()

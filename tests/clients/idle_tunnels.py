#!/usr/bin/env python3
"""Very many TCP connections that say little, and the service that answers them.

    idle_tunnels.py serve --port P
    idle_tunnels.py call --connections N PORT...

The service says again what it is told. The client opens N connections, to the ports in turn, says
its number over each, and prints `open N` when all have been answered. For each line on stdin it
says its number again over one in a hundred, and prints `well` when these have been answered; the
end of stdin ends it. Whatever is not as it should be ends it with 1.
"""

import argparse
import asyncio
import resource
import sys

# Connections that are being opened at a time.
AT_ONCE = 200


def raise_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class Client(asyncio.Protocol):
    def __init__(self, number: int) -> None:
        self.word = b"%08d" % number
        self.heard = b""
        self.answer: asyncio.Future | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.heard += data
        if len(self.heard) >= len(self.word) and self.answer:
            heard, self.heard, answer, self.answer = self.heard, b"", self.answer, None
            if not answer.done():
                answer.set_result(heard)

    def connection_lost(self, error: Exception | None) -> None:
        if self.answer and not self.answer.done():
            self.answer.set_exception(error or ConnectionResetError(f"{self.word} was closed"))

    async def talk(self) -> None:
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(self.word)
        heard = await asyncio.wait_for(self.answer, 60)
        assert heard == self.word, (heard, self.word)


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


async def call(ports: list[int], count: int) -> None:
    loop, turn = asyncio.get_running_loop(), asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> Client:
        async with turn:
            port = ports[number % len(ports)]
            _, client = await loop.create_connection(lambda: Client(number), "127.0.0.1", port)
            await client.talk()
            return client

    clients = await asyncio.gather(*(one(number) for number in range(count)))
    print(f"open {len(clients)}", flush=True)
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while await lines.readline():
        await asyncio.gather(*(client.talk() for client in clients[::100]))
        print("well", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="many idle TCP connections")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve").add_argument("--port", type=int, required=True)
    caller = commands.add_parser("call")
    caller.add_argument("--connections", type=int, required=True, metavar="N")
    caller.add_argument("ports", type=int, nargs="+", metavar="PORT")
    args = parser.parse_args()
    raise_descriptors()
    asyncio.run(serve(args.port) if args.command == "serve" else call(args.ports, args.connections))
    return 0


if __name__ == "__main__":
    sys.exit(main())

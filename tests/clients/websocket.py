#!/usr/bin/env python3
"""A WebSocket server, and a client that shakes many hands at once, both of the package `websockets`.

    websocket.py serve --port N
    websocket.py call URL [--connect IP:PORT] [--ca PEM] [--connections N] [--messages N]

The server repeats each message; `close CODE` makes it close with that code, and `fields` makes it tell
the fields of the handshake. The client sends each connection's own messages, texts, bytes and pings,
and prints {"connections", "messages", "pongs", "closed"}; whatever is not as it should be ends it
with 1.
"""

import argparse
import asyncio
import json
import ssl
import sys
from urllib.parse import urlsplit

from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve


async def answer(connection: ServerConnection) -> None:
    async for message in connection:
        if message == "fields":
            fields = connection.request.headers.raw_items()
            await connection.send(json.dumps([[name.lower(), value] for name, value in fields]))
        elif isinstance(message, str) and message.startswith("close "):
            await connection.close(int(message.split()[1]), "as you wish")
        else:
            await connection.send(message)


async def serve_for_ever(port: int) -> None:
    async with serve(answer, "127.0.0.1", port, subprotocols=["echo"], max_size=1 << 20):
        await asyncio.get_running_loop().create_future()


async def talk(args: argparse.Namespace, number: int, everybody: asyncio.Barrier) -> tuple[int, int, int]:
    url = urlsplit(args.url)
    host, port = args.connect.rsplit(":", 1) if args.connect else (url.hostname, url.port)
    more = {}
    if url.scheme == "wss":
        more["ssl"] = ssl.create_default_context(cafile=args.ca)
        more["server_hostname"] = url.hostname
    connection = await connect(args.url, host=host, port=int(port), subprotocols=["echo"], open_timeout=60, **more)
    assert connection.subprotocol == "echo", connection.subprotocol
    messages = 0
    for round in range(args.messages):
        for message in (f"{number} {round}", bytes([number % 256]) * (round * 10_000), ""):
            await connection.send(message)
            assert await connection.recv() == message, (number, round)
            messages += 1
    await asyncio.wait_for(await connection.ping(), 60)
    # All are open at once.
    await everybody.wait()
    await connection.send("close 4321")
    await connection.wait_closed()
    return messages, 1, connection.close_code


async def call(args: argparse.Namespace) -> None:
    everybody = asyncio.Barrier(args.connections)
    results = await asyncio.gather(*(talk(args, number, everybody) for number in range(args.connections)))
    print(
        json.dumps(
            {
                "connections": len(results),
                "messages": sum(messages for messages, _, _ in results),
                "pongs": sum(pongs for _, pongs, _ in results),
                "closed": sorted({code for _, _, code in results}),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    server = commands.add_parser("serve")
    server.add_argument("--port", type=int, required=True)
    client = commands.add_parser("call")
    client.add_argument("url")
    client.add_argument("--connect")
    client.add_argument("--ca")
    client.add_argument("--connections", type=int, default=1)
    client.add_argument("--messages", type=int, default=3)
    args = parser.parse_args()
    if args.command == "serve":
        asyncio.run(serve_for_ever(args.port))
    else:
        asyncio.run(call(args))


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""A page in headless Chromium that talks over many WebSockets at once.

    chromium_websocket.py URL --cert PEM [--connect IP:PORT] [--connections N] [--timeout S]

URL is wss://HOST[:PORT]/PATH of a server that repeats what it is told, and closes with the code
that `close CODE` names. A page of that host is loaded first, so that the browser has an HTTP/2
connection there. Each WebSocket sends a text and bytes and is closed by the server when all are
open. Prints {"page", "opened", "texts", "bytes", "codes"}.
"""

import argparse
import json
import sys
import time
from urllib.parse import urlsplit

from chromium_h3 import BROWSER_FLAGS, Browser, evaluate, spki_hash, tell

PAGE = """
(async (url, count) => {
    const told = {opened: 0, texts: 0, bytes: 0, codes: []};
    const sockets = Array.from({length: count}, () => new WebSocket(url, 'echo'));
    const next = (socket, what) => new Promise((good, bad) => {
        socket.addEventListener(what, good, {once: true});
        socket.addEventListener('error', () => bad(new Error('a WebSocket failed')), {once: true});
    });
    await Promise.all(sockets.map(async socket => {
        socket.binaryType = 'arraybuffer';
        await next(socket, 'open');
        told.opened += 1;
    }));
    await Promise.all(sockets.map(async (socket, number) => {
        socket.send('hello ' + number);
        if ((await next(socket, 'message')).data === 'hello ' + number) told.texts += 1;
        socket.send(new Uint8Array(50000).fill(number %% 256));
        const bytes = new Uint8Array((await next(socket, 'message')).data);
        if (bytes.length === 50000 && bytes.every(byte => byte === number %% 256)) told.bytes += 1;
    }));
    const codes = await Promise.all(sockets.map(async socket => {
        socket.send('close 4321');
        return (await next(socket, 'close')).code;
    }));
    told.codes = [...new Set(codes)];
    return told;
})(%s, %d)
"""


def run(args: argparse.Namespace) -> dict:
    url = urlsplit(args.url)
    target = f"MAP {url.hostname} {args.connect}" if args.connect else f"EXCLUDE {url.hostname}"
    flags = [
        *BROWSER_FLAGS,
        f"--ignore-certificate-errors-spki-list={spki_hash(args.cert)}",
        f"--host-resolver-rules={target}, MAP * ~NOTFOUND",
        "--disable-quic",
    ]
    with Browser("chromium", flags, time.monotonic() + args.timeout) as browser:
        browser.open_tab()
        page = browser.load(f"https://{url.netloc}/")
        told = evaluate(browser, PAGE % (json.dumps(args.url), args.connections))
        return {"page": page["protocol"], **told}


def main() -> int:
    parser = argparse.ArgumentParser(description="WebSockets in Chromium")
    parser.add_argument("--connections", type=int, default=200, metavar="N")
    return tell(parser, run)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""A page in headless Chromium that makes gRPC-Web calls, with the gRPC project's own client.

    chromium_grpc_web.py URL --package DIR --cert PEM [--connect IP:PORT] [--quic] [--timeout S]

URL is https://HOST[:PORT], where grpc_echo.py answers behind something that speaks gRPC-Web; DIR
is the unpacked npm package `grpc-web`. The page has the origin https://page.HOST, so that the
rules for other origins hold. Makes each call as text and, where that client can, as bytes.
Prints {"protocols", "text": {...}, "binary": {...}}.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from chromium_h3 import BROWSER_FLAGS, Browser, evaluate, spki_hash, tell

PAGE = """
(async (url) => {
    const exports = {};
    (function (exports) { SOURCE
    })(exports);
    const bytes = text => new TextEncoder().encode(text);
    const text = bytes => new TextDecoder().decode(bytes);
    const method = (name, kind) =>
        new exports.MethodDescriptor('/echo.Echo/' + name, kind, Uint8Array, Uint8Array, x => x, x => x);
    const {UNARY, SERVER_STREAMING} = exports.MethodType;
    const told = {};
    for (const format of ['text', 'binary']) {
        const client = new exports.GrpcWebClientBase({format});
        const unary = (name, request, fields) => new Promise(done => {
            let trailers = {};
            const path = url + '/echo.Echo/' + name;
            const call = client.rpcCall(path, request, fields || {}, method(name, UNARY), (error, answer) =>
                setTimeout(() => done({code: error ? error.code : 0, message: error && error.message, answer, trailers})));
            call.on('status', status => trailers = status.metadata || {});
        });
        const large = new Uint8Array(1000000).map((_, at) => at % 251);
        const echoed = await unary('Unary', large);
        const failed = await unary('Fail', bytes('x'));
        const late = await unary('Hang', bytes('x'), {deadline: String(Date.now() + 1000)});
        const unknown = await unary('Nothing', bytes('x'));
        told[format] = {
            unary: echoed.code === 0 && echoed.answer.length === large.length && echoed.answer.every((b, i) => b === large[i]),
            trailer: echoed.trailers['x-trailer'],
            failed: [failed.code, failed.message],
            late: late.code,
            unknown: unknown.code,
        };
        if (format === 'text') {
            const messages = [];
            const status = await new Promise(done => {
                const path = url + '/echo.Echo/ServerStream';
                const call = client.serverStreaming(path, bytes('100'), {}, method('ServerStream', SERVER_STREAMING));
                call.on('data', message => messages.push(text(message)));
                call.on('status', status => done(status.code));
                call.on('error', error => done(error.code));
            });
            told[format].stream = status === 0 && messages.length === 100 && messages.every((m, i) => m === 'msg-' + i);
        }
    }
    return told;
})(URL)
"""


def run(args: argparse.Namespace) -> dict:
    url = urlsplit(args.url)
    hosts = [url.hostname, f"page.{url.hostname}"]
    mapped = ", ".join(f"MAP {host} {args.connect}" for host in hosts) if args.connect else f"EXCLUDE *.{url.hostname}"
    flags = [
        *BROWSER_FLAGS,
        f"--ignore-certificate-errors-spki-list={spki_hash(args.cert)}",
        f"--host-resolver-rules={mapped}, MAP * ~NOTFOUND",
    ]
    if args.quic:
        port = url.port or 443
        flags += ["--enable-quic", f"--origin-to-force-quic-on={url.hostname}:{port}"]
    else:
        flags.append("--disable-quic")
    source = (args.package / "index.js").read_text()
    with Browser("chromium", flags, time.monotonic() + args.timeout) as browser:
        browser.open_tab()
        browser.load(f"https://page.{url.netloc}/")
        told = evaluate(browser, PAGE.replace("(URL)", f"({json.dumps(args.url)})").replace("SOURCE", source))
        # The page may not know what the answers of another origin came by.
        received = (event["params"] for event in browser.events if event["method"] == "Network.responseReceived")
        answers = [answer["response"] for answer in received if answer["response"]["url"].startswith(args.url)]
        return {"protocols": sorted({answer["protocol"] for answer in answers}), **told}


def main() -> int:
    parser = argparse.ArgumentParser(description="gRPC-Web in Chromium")
    parser.add_argument("--package", type=Path, required=True, metavar="DIR", help="the npm package grpc-web")
    parser.add_argument("--quic", action="store_true", help="speak HTTP/3 from the start")
    return tell(parser, run)


if __name__ == "__main__":
    sys.exit(main())

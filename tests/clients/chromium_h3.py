#!/usr/bin/env python3
"""Loads a URL in headless Chromium and tells which protocol it used.

    chromium_h3.py URL --cert PEM [--ca PEM] [--connect IP:PORT] [--via-alt-svc]
                   [--timeout S] [--browser PATH]

Prints {"status", "protocol", "body"} and exits with 0 when the page came over h3; otherwise
exits with 1, with "error" in the object when there was no response at all.

--cert is the server's own certificate: Chromium accepts its key without a public CA. With
--ca that certificate is also verified for the URL's host, with openssl.
Without --via-alt-svc Chromium speaks QUIC from the start. With it, the first load must come
over h2 from the TCP port of the same number, and the page is loaded again until the Alt-Svc
header has moved it to h3; "protocols" then lists every load. --connect holds for every port
of the host, so a port in Alt-Svc leads there, too; a page on a port below 1024 can be moved
only to another such port.
"""

import argparse
import base64
import fcntl
import hashlib
import ipaddress
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

# Between two loads that wait for Alt-Svc to take effect.
RELOAD_INTERVAL = 0.3

# A port of the host's where the page is not (tcpmux).
UNUSED_PORT = 1

# Enough for the browser to quit when asked, before it is killed.
QUIT_TIMEOUT = 3.0

OPENSSL_TIMEOUT = 10.0

BROWSER_FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
]


class BrowserError(Exception):
    """Why there is no response to report."""


def openssl(*args: str, data: bytes | None = None) -> bytes:
    command = ["openssl", *args]
    done = subprocess.run(command, input=data, capture_output=True, timeout=OPENSSL_TIMEOUT)
    if done.returncode != 0:
        raise BrowserError(f"openssl {args[0]}: {done.stderr.decode().strip()}")
    return done.stdout


def spki_hash(cert: Path) -> str:
    """The base64 SHA-256 of the certificate's public key, as Chromium's flag wants it."""
    public_key = openssl("x509", "-in", str(cert), "-noout", "-pubkey")
    der = openssl("pkey", "-pubin", "-outform", "der", data=public_key)
    return base64.b64encode(hashlib.sha256(der).digest()).decode()


def verify(cert: Path, ca: Path, host: str) -> None:
    try:
        ipaddress.ip_address(host)
        name = ["-verify_ip", host]
    except ValueError:
        name = ["-verify_hostname", host]
    openssl("verify", "-CAfile", str(ca), "-untrusted", str(cert), *name, str(cert))


class Browser:
    """A Chromium child, driven over the debugging pipe (CDP, JSON messages ended by NUL).

    The browser dies with this process: it reads end-of-file on the pipe, gets SIGKILL from
    the kernel (setpriv --pdeathsig), and its process group is killed on leaving `with`.
    """

    def __init__(self, executable: str, flags: list[str], deadline: float) -> None:
        self.deadline = deadline
        self.profile = tempfile.mkdtemp(prefix="chromium-h3-")
        self.events: deque[dict] = deque()
        self.unread = b""
        self.last_id = 0
        self.session: str | None = None
        try:
            self.spawn(executable, [*flags, f"--user-data-dir={self.profile}"])
        except BaseException:
            shutil.rmtree(self.profile, ignore_errors=True)
            raise

    def spawn(self, executable: str, flags: list[str]) -> None:
        browser_reads, self.to_browser = pipe_above_4()
        self.from_browser, browser_writes = pipe_above_4()
        argv = ["setpriv", "--pdeathsig", "KILL", "--", executable, *flags, "about:blank"]
        devnull = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        # The profile is the home, too: fonts, crash reports and key stores stay in it.
        environment = {**os.environ, "HOME": self.profile}
        wiring = [(browser_reads, 3), (browser_writes, 4), (devnull, 0), (devnull, 1), (devnull, 2)]
        self.pid = os.posix_spawnp(
            argv[0],
            argv,
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, ours, theirs) for ours, theirs in wiring],
            setsid=True,
        )
        for fd in (browser_reads, browser_writes, devnull):
            os.close(fd)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.to_browser)
        os.close(self.from_browser)
        quit_by = time.monotonic() + QUIT_TIMEOUT
        while time.monotonic() < quit_by:
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                self.kill_group()
                break
            time.sleep(0.02)
        else:
            self.kill_group()
            os.waitpid(self.pid, 0)
        shutil.rmtree(self.profile, ignore_errors=True)

    def kill_group(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def call(self, method: str, **params: object) -> dict:
        """Calls a CDP method and waits for its result; events met on the way are kept."""
        self.last_id += 1
        message: dict = {"id": self.last_id, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.last_id:
            self.events.append(answer)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def next_event(self) -> dict:
        return self.events.popleft() if self.events else self.receive()

    def receive(self) -> dict:
        while b"\0" not in self.unread:
            left = max(0.0, self.deadline - time.monotonic())
            if not select.select([self.from_browser], [], [], left)[0]:
                raise BrowserError("timed out")
            chunk = os.read(self.from_browser, 1 << 16)
            if not chunk:
                raise BrowserError("the browser ended")
            self.unread += chunk
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def open_tab(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        self.call("Page.enable")
        self.call("Network.enable")
        self.call("Network.setCacheDisabled", cacheDisabled=True)

    def load(self, url: str) -> dict:
        """Loads the page and returns the response to its main request."""
        self.events.clear()
        started = self.call("Page.navigate", url=url)
        if "errorText" in started:
            raise BrowserError(started["errorText"])
        # The main request of a navigation carries the navigation's loader id.
        request = started["loaderId"]
        response = None
        while True:
            event = self.next_event()
            params = event.get("params", {})
            if params.get("requestId") != request:
                continue
            if event["method"] == "Network.responseReceived":
                response = params["response"]
            elif event["method"] == "Network.loadingFailed":
                raise BrowserError(params["errorText"])
            elif event["method"] == "Network.loadingFinished" and response is not None:
                break
        return {
            "status": response["status"],
            "protocol": response["protocol"],
            "body": self.body(request),
        }

    def body(self, request: str) -> str:
        content = self.call("Network.getResponseBody", requestId=request)
        if content["base64Encoded"]:
            return base64.b64decode(content["body"]).decode(errors="replace")
        return content["body"]


def pipe_above_4() -> tuple[int, int]:
    """A pipe whose ends are clear of 3 and 4, where the browser wants to find its own."""
    ends = os.pipe()
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return moved


def browser_flags(args: argparse.Namespace) -> list[str]:
    url = urlsplit(args.url)
    host = url.hostname
    flags = [*BROWSER_FLAGS, f"--ignore-certificate-errors-spki-list={spki_hash(args.cert)}"]
    # The browser's own errands (updates, accounts) find no host to go to.
    target = f"MAP {host} {args.connect}" if args.connect else f"EXCLUDE {host}"
    flags.append(f"--host-resolver-rules={target}, MAP * ~NOTFOUND")
    # Chromium takes a private CA over QUIC only for the hosts named in this flag, on any of
    # their ports; but it forces QUIC only on the port given.
    forced_port = UNUSED_PORT if args.via_alt_svc else url.port or 443
    flags.append(f"--origin-to-force-quic-on={host}:{forced_port}")
    return flags


def evaluate(browser: Browser, expression: str) -> dict:
    """What a promise of the page comes to."""
    told = browser.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
    if "exceptionDetails" in told:
        raise BrowserError(told["exceptionDetails"]["exception"]["description"])
    return told["result"]["value"]


def tell(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], dict]) -> int:
    """The whole of a script that prints what a page did, with the options that all of them have."""
    parser.add_argument("url", metavar="URL")
    parser.add_argument("--cert", type=Path, required=True, metavar="PEM")
    parser.add_argument("--connect", metavar="IP:PORT", help="instead of the URL's host and port")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="for everything")
    args = parser.parse_args()
    if shutil.which("chromium") is None:
        parser.error("no chromium on this machine")
    try:
        told = run(args)
    except (BrowserError, BrokenPipeError) as error:
        print(json.dumps({"error": str(error)}))
        return 1
    print(json.dumps(told))
    return 0


def load_via_alt_svc(browser: Browser, url: str) -> dict:
    page = browser.load(url)
    protocols = [page["protocol"]]
    if protocols[0] != "h2":
        raise BrowserError(f"the first load came over {protocols[0]}, not h2")
    while page["protocol"] != "h3" and time.monotonic() + RELOAD_INTERVAL < browser.deadline:
        time.sleep(RELOAD_INTERVAL)
        page = browser.load(url)
        protocols.append(page["protocol"])
    return {**page, "protocols": protocols}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="load a URL in Chromium over HTTP/3")
    parser.add_argument("url", metavar="URL")
    parser.add_argument("--cert", type=Path, required=True, metavar="PEM")
    parser.add_argument("--ca", type=Path, metavar="PEM")
    parser.add_argument("--connect", metavar="IP:PORT", help="instead of the URL's host and port")
    parser.add_argument("--via-alt-svc", action="store_true")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S", help="for everything")
    parser.add_argument("--browser", default="chromium", metavar="PATH")
    args = parser.parse_args()
    if urlsplit(args.url).scheme != "https" or not urlsplit(args.url).hostname:
        parser.error("URL must be https://HOST[:PORT]/PATH")
    if shutil.which(args.browser) is None:
        parser.error(f"no browser {args.browser} on this machine")
    return args


def run(args: argparse.Namespace) -> dict:
    if args.ca:
        verify(args.cert, args.ca, urlsplit(args.url).hostname)
    deadline = time.monotonic() + args.timeout
    with Browser(args.browser, browser_flags(args), deadline) as browser:
        browser.open_tab()
        return load_via_alt_svc(browser, args.url) if args.via_alt_svc else browser.load(args.url)


def main() -> int:
    # A polite kill unwinds, so that the browser and its profile go, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        page = run(parse_args())
    except (BrowserError, subprocess.TimeoutExpired, BrokenPipeError) as error:
        page = {"status": None, "protocol": None, "body": None, "error": str(error)}
    print(json.dumps(page))
    return 0 if page["protocol"] == "h3" else 1


if __name__ == "__main__":
    sys.exit(main())

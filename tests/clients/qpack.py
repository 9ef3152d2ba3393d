#!/usr/bin/env python3
"""Reads QPACK field sections with ls-qpack, and writes them anew.

    qpack.py < IN.json > OUT.json

IN is an array of sections in hexadecimal. OUT is an array of
    {"fields": [[name, value], ...], "section": HEX}
where `fields` is what ls-qpack read and `section` the same fields as ls-qpack writes them,
without a dynamic table. A section that it cannot read is an error and exit code 1.
"""

import json
import sys

import pylsqpack


def main() -> int:
    out = []
    for number, section in enumerate(json.load(sys.stdin)):
        decoder = pylsqpack.Decoder(0, 0)
        encoder = pylsqpack.Encoder()
        encoder.apply_settings(0, 0)
        _, fields = decoder.feed_header(number, bytes.fromhex(section))
        _, again = encoder.encode(number, fields)
        text = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in fields]
        out.append({"fields": text, "section": again.hex()})
    json.dump(out, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())

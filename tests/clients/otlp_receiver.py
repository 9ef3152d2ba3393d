"""A strict receiver of OTLP over HTTP: decodes with the official messages, and writes what it got as JSON lines.

Each line has "problem" if something is against the protocol. Modes: "take" everything; be "busy" (503, Retry-After) for the
first three posts of each kind; "refuse" (400) all; "hang" and never answer; "partial", which takes all but one span of each post.
"""

import argparse
import json
import ssl
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int, required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--mode", default="take")
parser.add_argument("--cert")
parser.add_argument("--key")
args = parser.parse_args()

out = open(args.out, "w")
lock = threading.Lock()
posts = {}


def say(what):
    with lock:
        print(json.dumps(what), file=out, flush=True)


def attributes(pairs):
    values = {}
    for pair in pairs:
        kind = pair.value.WhichOneof("value")
        assert kind is not None, f"{pair.key} has no value"
        assert pair.key not in values, f"{pair.key} is there twice"
        values[pair.key] = getattr(pair.value, kind)
    return values


def span_of(span):
    assert len(span.trace_id) == 16 and any(span.trace_id), "trace_id"
    assert len(span.span_id) == 8 and any(span.span_id), "span_id"
    assert len(span.parent_span_id) in (0, 8), "parent_span_id"
    assert span.name, "a span has a name"
    assert span.kind in (2, 3), "server or client"
    now = time.time_ns()
    assert now - 3600 * 10**9 < span.start_time_unix_nano <= span.end_time_unix_nano <= now + 10**9, "times"
    values = attributes(span.attributes)
    assert (span.status.code == 2) == ("error.type" in values), "an error has a type"
    return {
        "trace": span.trace_id.hex(),
        "span": span.span_id.hex(),
        "parent": span.parent_span_id.hex(),
        "state": span.trace_state,
        "name": span.name,
        "kind": {2: "server", 3: "client"}[span.kind],
        "ms": (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6,
        "attributes": values,
        "links": [link.trace_id.hex() for link in span.links],
        "error": values.get("error.type"),
    }


def metric_of(metric):
    assert metric.name and metric.unit, "name and unit"
    kind = metric.WhichOneof("data")
    points = []
    seen = set()
    since = set()
    for point in getattr(metric, kind).data_points:
        values = attributes(point.attributes)
        key = json.dumps(values, sort_keys=True)
        assert key not in seen, f"{metric.name} has {key} twice"
        seen.add(key)
        assert point.time_unix_nano > 0, "time"
        since.add(point.start_time_unix_nano)
        if kind == "exponential_histogram":
            assert point.scale == 4, "scale"
            counts = list(point.positive.bucket_counts)
            assert sum(counts) + point.zero_count == point.count, "counts"
            points.append({"attributes": values, "count": point.count, "sum": point.sum,
                           "offset": point.positive.offset, "counts": counts})
        else:
            points.append({"attributes": values, "value": point.as_int})
    if kind in ("sum", "exponential_histogram"):
        assert getattr(metric, kind).aggregation_temporality == 2, "cumulative"
        assert len(since) < 2 and 0 not in since, "since when it was counted"
    return {"metric": metric.name, "unit": metric.unit, "kind": kind, "points": points, "since": max(since, default=0)}


def traces(body):
    request = ExportTraceServiceRequest.FromString(body)
    count = 0
    for resource in request.resource_spans:
        who = attributes(resource.resource.attributes)
        for scope in resource.scope_spans:
            for span in scope.spans:
                count += 1
                say({"resource": who, **span_of(span)})
    assert count > 0, "an empty batch"
    answer = ExportTraceServiceResponse()
    if args.mode == "partial":
        answer.partial_success.rejected_spans = 1
    return answer.SerializeToString()


def metrics(body):
    request = ExportMetricsServiceRequest.FromString(body)
    for resource in request.resource_metrics:
        who = attributes(resource.resource.attributes)
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                say({"resource": who, **metric_of(metric)})
    return ExportMetricsServiceResponse().SerializeToString()


class Receiver(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        kind = {"/v1/traces": traces, "/v1/metrics": metrics}.get(self.path)
        with lock:
            nth = posts[self.path] = posts.get(self.path, 0) + 1
        try:
            assert kind is not None, f"a post to {self.path}"
            assert self.headers["content-type"] == "application/x-protobuf", "content-type"
            if args.mode == "hang":
                say({"hung": self.path})
                time.sleep(3600)
            if args.mode == "busy" and nth <= 3:
                return self.answer(503, b"", {"retry-after": "1"})
            if args.mode == "refuse":
                return self.answer(400, b"")
            if self.headers["authorization"]:
                say({"authorization": self.headers["authorization"]})
            self.answer(200, kind(body))
        except Exception as problem:
            say({"problem": repr(problem)})
            self.answer(400, b"")

    def answer(self, status, body, fields={}):
        self.send_response(status)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(body)))
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", args.port), Receiver)
server.daemon_threads = True
if args.cert:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(args.cert, args.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
try:
    server.serve_forever()
except KeyboardInterrupt:
    sys.exit(0)

#!/usr/bin/env python3
"""A gRPC service that tells what it is, and a client that knows nothing but where it is.

    grpc_by_reflection.py serve --port P
    grpc_by_reflection.py call --target IP:PORT --authority NAME

The service is time.Clock with one method, Add, which adds seconds to a google.protobuf.Timestamp.
The client asks for the services by server reflection (grpc.reflection.v1alpha), as grpcurl does,
makes its messages from the descriptors that it is given, and prints
{"services", "methods", "sum"}.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

SERVICE = "time.Clock"


def described() -> descriptor_pool.DescriptorPool:
    """time.Clock as a compiler would describe it."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="time.proto", package="time", syntax="proto3")
    for name, fields in {"Question": ["at", "more"], "Answer": ["at"]}.items():
        message = file.message_type.add(name=name)
        for number, field in enumerate(fields, 1):
            label, kind = kinds.LABEL_OPTIONAL, kinds.TYPE_INT64
            message.field.add(name=field, number=number, label=label, type=kind)
    service = file.service.add(name="Clock")
    service.method.add(name="Add", input_type=".time.Question", output_type=".time.Answer")
    pool = descriptor_pool.Default()
    pool.Add(file)
    return pool


def message_of(pool: descriptor_pool.DescriptorPool, name: str) -> type:
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


def serve(port: int) -> None:
    pool = described()
    question, answer = message_of(pool, "time.Question"), message_of(pool, "time.Answer")
    add = grpc.unary_unary_rpc_method_handler(
        lambda asked, _: answer(at=asked.at + asked.more),
        request_deserializer=question.FromString,
        response_serializer=answer.SerializeToString,
    )
    server = grpc.server(ThreadPoolExecutor(max_workers=8))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Add": add}),))
    reflection.enable_server_reflection((SERVICE, reflection.SERVICE_NAME), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


def call(target: str, authority: str) -> None:
    options = [("grpc.enable_http_proxy", 0), ("grpc.default_authority", authority)]
    with grpc.insecure_channel(target, options) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = sorted(database.get_services())
        pool = descriptor_pool.DescriptorPool(database)
        method = pool.FindServiceByName(SERVICE).methods_by_name["Add"]
        question = message_factory.GetMessageClass(method.input_type)
        answer = message_factory.GetMessageClass(method.output_type)
        add = channel.unary_unary(f"/{SERVICE}/Add", question.SerializeToString, answer.FromString)
        told = {"services": services, "methods": [method.full_name], "sum": add(question(at=40, more=2), timeout=30).at}
    print(json.dumps(told))


def main() -> int:
    parser = argparse.ArgumentParser(description="gRPC by reflection")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve").add_argument("--port", type=int, required=True)
    caller = commands.add_parser("call")
    caller.add_argument("--target", required=True, metavar="IP:PORT")
    caller.add_argument("--authority", required=True, metavar="NAME")
    args = parser.parse_args()
    if args.command == "serve":
        serve(args.port)
    else:
        call(args.target, args.authority)
    return 0


if __name__ == "__main__":
    sys.exit(main())

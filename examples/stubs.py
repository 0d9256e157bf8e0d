"""Calls the server with the generated gRPC stubs, without the client library."""

import os

import grpc

from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1.text_generation_pb2_grpc import TextGenerationServiceStub

with grpc.insecure_channel(os.environ.get("MPT_GRPC_TARGET", "localhost:50051")) as channel:
    service = TextGenerationServiceStub(channel)
    print(service.GetModelInfo(pb.GetModelInfoRequest()).name)
    request = pb.GenerateRequest(
        text="The fox",
        sampling=pb.SamplingParameters(temperature=0.8, seed=7),
        stopping=pb.StoppingCriteria(max_new_tokens=30, stop_strings=["\n"]),
    )
    for response in service.StreamGenerate(request):
        print(response.output.text, end="", flush=True)
    print()

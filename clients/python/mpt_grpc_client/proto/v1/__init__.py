"""Messages and stubs of the proto package `mpt.v1`.

    from mpt_grpc_client.proto.v1 import text_generation_pb2, text_generation_pb2_grpc
"""

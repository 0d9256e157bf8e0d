"""Messages and stubs of the proto package `mpt.v1alpha1`, which may change in any release.

    from mpt_grpc_client.proto.v1alpha1 import debug_pb2, debug_pb2_grpc
"""

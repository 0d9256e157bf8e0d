"""The Python code generated from protos/, for callers that prefer gRPC's own stubs to `Client`.

`mpt_grpc_client.proto.v1` is covered by docs/compatibility.md; `mpt_grpc_client.proto.v1alpha1` may change in any
release. Regenerate it with `make protos`.
"""

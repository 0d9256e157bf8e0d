"""Generated from protos/mpt/v1 by `make protos`."""

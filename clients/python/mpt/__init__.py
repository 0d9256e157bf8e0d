"""Generated from protos/mpt by `make protos`."""

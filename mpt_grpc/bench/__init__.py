"""The load generator: plans requests, sends them over gRPC or HTTP, and turns their times into statistics.

`load` plans, `runner` sends through an `endpoint`, `metrics` computes, `report` and `plot` show. docs/benchmarking.md
defines the metrics.
"""

"""A collector of spans and metrics, over OTLP by gRPC."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class Collector:
    """What was received."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.metrics: dict[str, Any] = {}
        """The last value of each metric, by name."""
        self._changed = threading.Condition()

    def wait_for(self, is_complete: Callable[[Collector], bool]) -> None:
        """Blocks until what was received is complete."""
        with self._changed:
            assert self._changed.wait_for(lambda: is_complete(self), 30)

    def trace(self, trace_id: str) -> dict[str, Any]:
        """Returns the spans of a trace, by name."""
        return {span.name: span for span in self.spans if span.trace_id.hex() == trace_id}

    def receive_spans(self, request: Any) -> None:
        with self._changed:
            self.spans += [s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans]
            self._changed.notify_all()

    def receive_metrics(self, request: Any) -> None:
        with self._changed:
            found = [m for r in request.resource_metrics for scope in r.scope_metrics for m in scope.metrics]
            self.metrics |= {metric.name: metric for metric in found}
            self._changed.notify_all()


class _Traces(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        self._collector.receive_spans(request)
        return trace_service_pb2.ExportTraceServiceResponse()


class _Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        self._collector.receive_metrics(request)
        return metrics_service_pb2.ExportMetricsServiceResponse()


@contextmanager
def running_collector() -> Iterator[tuple[Collector, str]]:
    """Yields a collector and its endpoint."""
    collector = Collector()
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Traces(collector), server)
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(_Metrics(collector), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield collector, f"http://127.0.0.1:{port}"
        server.stop(None).wait()


def attributes(of: Any) -> dict[str, Any]:
    """Returns the attributes of a span, an event or a point as Python values."""
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in of.attributes}

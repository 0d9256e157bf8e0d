"""Metrics and traces by OpenTelemetry: what is recorded, under which names, and where it is exported."""

"""OpenTelemetry tracing: the spans that are recorded, their names, and where they are exported."""

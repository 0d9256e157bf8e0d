"""OpenTelemetry: what is measured, under which names, and where it goes."""

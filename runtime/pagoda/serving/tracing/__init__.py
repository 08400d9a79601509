"""Traces of requests for OpenTelemetry: every server has `seam`, only one that exports has `otel` and what that imports."""

"""Whether a server exports traces, and with what."""

from __future__ import annotations

from importlib.util import find_spec

from pagoda.config.schema import PagodaConfig
from pagoda.errors import ConfigError
from pagoda.serving.tracing.seam import Tracing

MISSING = (
    "otlp_traces_endpoint needs OpenTelemetry's SDK and its OTLP exporters, which are not installed: "
    "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-grpc opentelemetry-exporter-otlp-proto-http"
)


def check_tracing(config: PagodaConfig) -> None:
    """Raise `ConfigError` where traces are to be exported and cannot be."""
    if config.otlp_traces_endpoint is not None:
        packages = (
            "opentelemetry.sdk",
            "opentelemetry.exporter.otlp.proto.grpc",
            "opentelemetry.exporter.otlp.proto.http",
        )
        if not all(_is_there(package) for package in packages):
            raise ConfigError(MISSING)


def make_tracing(config: PagodaConfig) -> Tracing:
    """What `otlp_traces_endpoint` and `collect_detailed_traces` ask for. Raises `ConfigError` where that cannot be."""
    if config.otlp_traces_endpoint is None:
        return Tracing()
    check_tracing(config)
    from pagoda.serving.tracing.otel import OtelTracing

    return OtelTracing(config.otlp_traces_endpoint, is_detailed=bool(config.collect_detailed_traces))


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of a package around it
        return False

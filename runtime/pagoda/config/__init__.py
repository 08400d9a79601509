"""Configuration: one schema, its sources and their order, the hardware report and the values chosen at start."""

from pagoda.config.schema import PagodaConfig
from pagoda.config.sources import LoadedConfig, from_kwargs, load
from pagoda.config.validation import schema_json

__all__ = ["LoadedConfig", "PagodaConfig", "from_kwargs", "load", "schema_json"]

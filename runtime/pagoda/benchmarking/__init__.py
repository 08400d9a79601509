"""Benchmarks: workloads, load on a server, the engine without a server, and statistics. Used by `pagoda bench`."""

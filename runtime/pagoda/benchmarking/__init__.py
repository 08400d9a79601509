"""Measuring: workloads, load on a server, the engine by itself, and what the figures say. Behind `pagoda bench`."""

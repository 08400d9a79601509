"""Everything that imports KServe."""

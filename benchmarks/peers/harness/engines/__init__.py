"""One module an engine. Each runs in the virtual environment of its own engine and imports no other's packages."""

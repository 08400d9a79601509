"""The engine core: its loop, its start-up, its process."""

"""The engine core as the API process sees it."""

"""The web page `/ui` and the stream of events behind it."""

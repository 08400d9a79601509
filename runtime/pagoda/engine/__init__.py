"""The engine: messages, the core loop, the core's process and the client that speaks to it, health."""

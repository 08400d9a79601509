"""The engine: messages, the core loop, the core's process the client, health."""

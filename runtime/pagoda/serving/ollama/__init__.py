"""Ollama's routes over the chats and completions of this server."""

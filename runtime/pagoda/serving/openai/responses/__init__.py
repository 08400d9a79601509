"""OpenAI's Responses over the chats of this server: what Codex and OpenAI's SDKs speak."""

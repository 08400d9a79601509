"""Anthropic's Messages over the chats of this server: what Claude Code and Anthropic's SDKs speak."""

"""What a model writes to an assistant's message: content, reasoning and tool calls, whole and streamed by one parser."""

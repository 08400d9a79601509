"""The routes of Hugging Face's Text Generation Inference over the completions of this server."""

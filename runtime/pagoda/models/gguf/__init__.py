"""GGUF files of llama.cpp as checkpoints: what a directory of the Hugging Face format would hold, derived from one file."""

"""How a model is spread over ranks, and how the ranks talk to each other."""

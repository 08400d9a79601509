"""What a request that pools asks for, and what it gets: vectors and scores instead of tokens. Imports no torch."""

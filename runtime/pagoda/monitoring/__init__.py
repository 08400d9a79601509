"""What `pagoda top`, `why` and `report` know of a running server: its answers, asked for from outside, and what follows."""

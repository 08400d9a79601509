"""More than one rank: the layout of ranks, their process groups and collectives, network interfaces, checks before the start."""

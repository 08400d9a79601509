"""Ranks as processes: the group, its links and messages."""

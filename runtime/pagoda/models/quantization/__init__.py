"""Weights of 8 and of 4 bits: rounded when they are loaded, or read from checkpoints that have them so."""

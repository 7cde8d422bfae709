"""Random calls of the ops against an oracle in plain Python: `make fuzz`."""

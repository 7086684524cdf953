"""Console commands: argument parsing and printing only."""

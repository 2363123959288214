"""What `xdplb up` runs: from verdicts, neighbours and commands to the maps, for as long as it lives."""

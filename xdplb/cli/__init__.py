"""The command line, and how it shows what it was answered."""

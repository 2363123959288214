"""How commands reach a running daemon, and what they are answered."""

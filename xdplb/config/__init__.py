"""The configuration file, from text to `model.Config`, and what differs between two of them."""

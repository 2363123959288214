"""Laboratories of network namespaces on this machine, for tests and the demo."""

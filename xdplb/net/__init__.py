"""The kernel's network configuration: interfaces, addresses, neighbours, routes, settings."""

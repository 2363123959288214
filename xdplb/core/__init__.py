"""Decisions, pure: values in, values out; no clocks, no sockets, no logging."""

"""Health checks: when a backend is checked, and what each kind of check does on the wire."""

"""Health checks: when a backend is checked, and what each kind (kinds.py) does on the wire."""

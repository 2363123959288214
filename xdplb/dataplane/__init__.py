"""The packet path as the control plane sees it: compiled, loaded, its maps written and read."""

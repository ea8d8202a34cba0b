"""Which query of a prompt sees which key, and how that is chosen: arithmetic below both router and engine."""

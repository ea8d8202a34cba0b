"""The sps2 command: up, generate, status, top, bench, eval, simulate."""

"""`sps2 bench decode`: tokens per second, time between tokens and bytes of decode, beside its baselines."""

"""`sps2 bench prefill`: time to first token, bytes, FLOPs and memory of prefill, beside its baselines."""

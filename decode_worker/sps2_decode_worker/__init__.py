"""SP decode: continuous batches, Q moves, KV stays."""

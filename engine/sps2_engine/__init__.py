"""What the two workers share: models, attention, paged KV, transfers. Knows nothing about gRPC."""

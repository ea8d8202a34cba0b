"""What the two workers share: models, attention, paged KV, transfers, the engine process."""

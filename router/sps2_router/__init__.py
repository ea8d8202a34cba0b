"""The public gRPC service: tokenizes, admits, schedules, retries, relays tokens."""

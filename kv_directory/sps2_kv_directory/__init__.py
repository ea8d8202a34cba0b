"""gRPC in front of Redis: who lives, where KV lies, leases and fences."""

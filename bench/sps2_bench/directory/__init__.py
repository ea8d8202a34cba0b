"""The KV directory under the load of a large deployment."""

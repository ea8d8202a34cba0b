"""What a long prompt's prefill does to running decodes: pools apart, an unrelated process, and the sarathi baseline."""

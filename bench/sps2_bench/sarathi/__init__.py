"""The baseline: chunked prefill and decodes in one engine of one process, after Sarathi-Serve."""

"""`sps2 eval accuracy`: CSA profiles beside dense prefill, on the same weights and prompts."""

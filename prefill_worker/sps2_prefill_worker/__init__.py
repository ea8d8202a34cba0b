"""SP prefill with CSA; pushes KV to its decode group while it computes."""

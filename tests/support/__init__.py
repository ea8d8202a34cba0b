"""What tests share: processes, ports, the skip gate. Imports nothing of SPS2's own rooms."""

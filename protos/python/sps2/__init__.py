"""Generated from protos/sps2 by scripts/generate_protos.py; do not edit."""

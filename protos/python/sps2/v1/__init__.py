"""Generated from protos/sps2/v1 by scripts/generate_protos.py; do not edit."""

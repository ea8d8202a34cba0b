"""Generated from protos/sps2/internal by scripts/generate_protos.py; do not edit."""

"""Tensors in, tensors out: one file per kernel family, Triton beside its plain twin."""

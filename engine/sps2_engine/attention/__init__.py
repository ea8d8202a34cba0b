"""Attention over ranks: pure plans, and one file for each exchange schedule."""

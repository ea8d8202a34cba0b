"""Loads what all test folders share; the fixtures themselves live in tests/support/."""

pytest_plugins = ["support.skip_gate", "support.fixtures"]

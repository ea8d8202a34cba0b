"""Loads what all test folders share; the fixtures themselves live in tests/support/."""

# triton_plugin first: it must import triton before anything that the others import can.
pytest_plugins = ["support.triton_plugin", "support.skip_gate", "support.side_by_side", "support.fixtures"]

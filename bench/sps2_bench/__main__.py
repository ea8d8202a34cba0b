"""`python -m sps2_bench bench|eval ...` is `sps2 bench|eval ...`."""

from sps2_bench.app import app

if __name__ == "__main__":
    app(prog_name="sps2")

"""`python -m sps2_cli` is `sps2`."""

from sps2_cli.main import app

if __name__ == "__main__":
    app(prog_name="sps2")

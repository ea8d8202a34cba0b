"""`python -m sps2_decode_worker.engine`: the engine process of one decode rank."""

from sps2_engine.runtime.main import run_engine

from sps2_decode_worker.loop import DecodeRole

if __name__ == "__main__":
    run_engine(DecodeRole)

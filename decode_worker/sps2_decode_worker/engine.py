"""`python -m sps2_decode_worker.engine`: the engine process of one decode rank."""

from sps2_decode_worker.loop import DecodeRole
from sps2_engine.runtime.device import use_huge_pages
from sps2_engine.runtime.main import run_engine
from sps2_service.telemetry import configure_logging

if __name__ == "__main__":
    use_huge_pages()
    run_engine(DecodeRole, configure_logging)

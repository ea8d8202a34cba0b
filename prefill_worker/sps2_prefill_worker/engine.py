"""`python -m sps2_prefill_worker.engine`: the engine process of one prefill rank."""

from sps2_engine.runtime.main import run_engine
from sps2_prefill_worker.loop import PrefillRole
from sps2_service.telemetry import configure_logging

if __name__ == "__main__":
    run_engine(PrefillRole, configure_logging)

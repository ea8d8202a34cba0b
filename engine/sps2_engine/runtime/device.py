"""Which device an engine computes on, and what follows from it."""

import logging
import os

import torch

_log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve_device(name: str, rank: int) -> torch.device:
    """`auto`, `cpu` or `cuda` -> a device; `cuda` picks the GPU of the rank's number on this host.

    Raises:
        ValueError: `cuda` where there is none.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no GPU here; use --device cpu or auto")
    return torch.device("cuda", rank % torch.cuda.device_count())


def set_up_device(device: torch.device, threads: int) -> None:
    """Sets threads (CPU) or the current device (GPU) and says in the log what was picked.

    Args:
        threads: threads of one operator on a CPU, >= 1.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        _log.info("device %s (%s): NCCL, CUDA kernels", device, torch.cuda.get_device_name(device))
        return
    torch.set_num_threads(threads)
    _log.info("device cpu: Gloo, CPU kernels, %d of %s threads", threads, os.cpu_count())

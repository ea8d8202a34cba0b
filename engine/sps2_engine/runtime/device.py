"""Which device an engine computes on, and what follows from it."""

import logging
import os
from pathlib import Path

import torch

from sps2_kernels.cpu_features import has_bf16_products

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


def resolve_dtype(name: str, device: torch.device) -> str:
    """`auto`, `fp32` or `bf16` -> `fp32` or `bf16`: auto takes bf16 where the device multiplies it in hardware."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" or has_bf16_products() else "fp32"


def kv_dtype(dtype: str, device: torch.device) -> str:
    """What KV is kept in: fp32 on a CPU, whose decode attention is often ten times slower over bf16."""
    return "fp32" if device.type == "cpu" else dtype


def use_compile_cache() -> None:
    """Compiled kernels go to the user's cache folder, one for all ranks: `$XDG_CACHE_HOME/sps2/inductor`.

    Before anything is compiled. Torch's own choice is a folder in /tmp, which nobody clears. No pool of compiler
    processes either: there are a few kernels of a second each, and the pool would have to be waited for.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "sps2" / "inductor"))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def use_huge_pages() -> None:
    """Lets large tensors on the CPU lie in pages of 2 MiB, where the system allows; before the first is made.

    For ranks that decode: reading all weights and KV in each step is a tenth to a third faster.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch's allocator


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

"""Compiles every kernel key ahead of time, without a GPU, and lists what each costs.

`python -m sps2_kernels.compile_report [--json] [--only REGEX]`. Registers and spills are what ptxas reports, wgmma is
counted in the PTX. Needs triton; not imported by the engine.
"""

import argparse
import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sps2_kernels.shape import HEAD_DIMS, KernelShape
from sps2_kernels.triton_forms.keys import model_keys
from sps2_kernels.triton_forms.launch import KernelKey

TARGET = GPUTarget("cuda", 90, 32)
"""H100 and H200."""
MAX_SHARED_BYTES = 227 * 1024
"""Shared memory that one block may have there."""


@dataclass(frozen=True)
class CompiledKey:
    """What the compiler made of a key."""

    name: str
    warps: int
    stages: int
    registers: int
    """Of a thread; 255 is the most there are."""
    shared_bytes: int
    """Of a block."""
    spill_bytes: int
    """Of a thread: registers that are stored to memory for want of room."""
    wgmma: int
    """Warp-group matrix instructions in the PTX."""
    mma: int
    """Warp matrix instructions in the PTX: what products of 16 rows take."""
    serialized: bool
    """Whether ptxas warns that wgmmas wait for each other, which costs most of their speed."""


def all_keys() -> Iterator[KernelKey]:
    """The keys of every dtype and head size; those that do not depend on the head size come once for each."""
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim in HEAD_DIMS:
            yield from model_keys(KernelShape(32, 8, head_dim, dtype))


def compile_key(key: KernelKey) -> CompiledKey:
    """Compiles one key for sm_90 to PTX and cubin, anew each time; raises what the compiler raises."""
    divisible = {(list(key.signature).index(name),): [["tt.divisibility", 16]] for name in key.aligned}
    constants = dict.fromkeys(key.constants, "constexpr")
    source = ASTSource(key.kernel, {**key.signature, **constants}, dict(key.constants), divisible)
    options = {"num_warps": key.tiles.num_warps, "num_stages": key.tiles.num_stages}
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.compilation.always_compile = True  # what comes from the cache has no log
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=TARGET, options=options)
    ptx = compiled.asm["ptx"]
    return CompiledKey(
        name=key.name,
        warps=key.tiles.num_warps,
        stages=key.tiles.num_stages,
        registers=_number(r"Used (\d+) registers", log.getvalue()),
        shared_bytes=compiled.metadata.shared,
        spill_bytes=_number(r"(\d+) bytes spill stores", log.getvalue()),
        wgmma=len(re.findall(r"^\s*wgmma\.mma_async", ptx, re.MULTILINE)),
        mma=len(re.findall(r"^\s*mma\.sync", ptx, re.MULTILINE)),
        serialized="wgmma.mma_async instructions are serialized" in log.getvalue(),
    )


def _number(pattern: str, log: str) -> int:
    """The number that ptxas reports of the one kernel it compiled."""
    found = re.search(pattern, log)
    if found is None:
        raise ValueError(f"ptxas reports nothing like {pattern!r}:\n{log}")
    return int(found.group(1))


def as_table(listing: Sequence[CompiledKey]) -> str:
    """The listing in aligned columns, with a heading."""
    heading = tuple(field.name for field in fields(CompiledKey))
    lines = [heading, *(tuple(str(value) for value in astuple(key)) for key in listing)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if column else text.ljust(width) for column, (text, width) in enumerate(cells)
        )
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the listing; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m sps2_kernels.compile_report", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    parser.add_argument("--only", default="", help="regular expression: only keys whose name contains it")
    options = parser.parse_args(arguments)
    chosen = {key.name: key for key in all_keys() if re.search(options.only, key.name)}
    listing = [compile_key(key) for key in chosen.values()]
    if options.json:
        sys.stdout.write(json.dumps([asdict(key) for key in listing], indent=1) + "\n")
    else:
        sys.stdout.write(as_table(listing) + "\n")


if __name__ == "__main__":
    main()

"""A program: prints whether `warm_up` launches exactly the kernel keys that `model_keys` lists, without a GPU.

It runs in a process of its own, where the Triton forms are not interpreted. They are called with CPU tensors, and in
place of the launch triton's own rules say under which types, constants and alignments it would compile.
Arguments: query heads, KV heads, head size, dtype (float32 or bfloat16).
"""

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime import jit

from sps2_kernels import warm_up
from sps2_kernels.shape import KernelShape
from sps2_kernels.triton_forms.keys import FAMILIES, model_keys
from sps2_kernels.triton_forms.launch import KernelKey

Key = tuple[str, str]
"""The kernel, and all that it is compiled under as JSON."""


def as_key(kernel: str, types: dict[str, str], constants: dict[str, Any], aligned: set[str]) -> Key:
    constants = {
        name: value for name, value in constants.items() if name != "upcast"
    }  # says: interpreter or not
    return kernel, json.dumps([types, constants, sorted(aligned)], sort_keys=True, default=str)


def listed(key: KernelKey) -> Key:
    kernel: Any = key.kernel
    return as_key(kernel.__name__, dict(key.signature), dict(key.constants), set(key.aligned))


def launched(shape: KernelShape) -> set[Key]:
    """What `warm_up` launches when every family takes its Triton form."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    keys: set[Key] = set()

    def record(kernel: Any, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        del grid, warmup
        bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, _ = bind(*args, **kwargs)
        types: dict[str, str] = {}
        constants: dict[str, Any] = {}
        aligned: set[str] = set()
        for (name, value), (kind, attribute) in zip(bound.items(), specialization, strict=True):
            if kind == "constexpr":
                constants[name] = value
            else:
                types[name] = kind
            if kind != "constexpr" and attribute and "D" in attribute:
                aligned.add(name)
        keys.add(as_key(kernel.__name__, types, constants, aligned))

    jit.JITFunction.run = record
    for family in FAMILIES:
        for name, form in vars(family).items():
            if name in vars(warm_up) and getattr(form, "__module__", "") == family.__name__:
                setattr(warm_up, name, form)
    warm_up.warm_up(shape, torch.device("cpu"))
    return keys


if __name__ == "__main__":
    num_q_heads, num_kv_heads, head_dim = map(int, sys.argv[1:4])
    shape = KernelShape(num_q_heads, num_kv_heads, head_dim, getattr(torch, sys.argv[4]))
    expected, actual = {listed(key) for key in model_keys(shape)}, launched(shape)
    differences = {"only listed": sorted(expected - actual), "only launched": sorted(actual - expected)}
    sys.stdout.write(json.dumps(differences, indent=1))

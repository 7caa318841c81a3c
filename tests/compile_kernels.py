"""Compile every kernel for GPUs that need not be there, and print what each asks of them: a line of JSON a kernel.

Run without ``TRITON_INTERPRET``, which replaces the compiler.
"""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from metaadamw_lite import triton_kernels as kernels
from metaadamw_lite.modulator import Modulator
from metaadamw_lite.triton_step import BLOCK, CHUNK, Weights

WORDS, NUMBERS, INDICES, COUNT = "*i64", "*fp64", "*i32", "i32"
TYPES = {
    "table": WORDS,
    "chunks": INDICES,
    "columns": INDICES,
    "n": COUNT,
    "n_chunks": COUNT,
    "groups": COUNT,
    "layers": COUNT,
    "at_time": COUNT,
}
TABLES = ("numbers", "partial", "sums", "constants", "rates")


def variants():
    """Every kernel with constants of every kind, and types of what is Φ's."""
    for same in (0, 0b10101010, -1):
        yield kernels.sum_chunks, {"SAME": same, "ZEROS": same < 0, "CHUNK": CHUNK, "BLOCK": BLOCK}, "*fp32"
        yield kernels.update, {"SAME": same, "DOUBLE": same < 0, "CHUNK": CHUNK, "BLOCK": BLOCK}, "*fp32"
    yield kernels.sum_tensors, {"CHUNK": CHUNK, "BLOCK": 512}, "*fp32"
    for columns, standardised in ((5, True), (7, False)):
        constants = {"COLUMNS": columns, "STANDARDISED": standardised, "GROUPS": 64, "BLOCK": 64}
        yield kernels.feature_columns, constants, "*fp64" if standardised else "*fp32"
    for phi in ("*fp32", "*fp64"):
        yield kernels.prepare, {"BLOCK": 128}, phi
    # The default Φ, the paper's, gates and embeddings, and the largest that are not left to the module.
    for groups, columns, heads, hidden, more in (
        (10, 6, 6, 16, {}),
        (30, 10, 7, 64, {"group_embed_dim": 4, "gating": True}),
        (64, 16, 16, 16, {}),
        (64, 19, 19, 64, {}),
    ):
        settings = {"layers": 1, "heads": heads, "hidden_dim": hidden, "alpha_range": 1.0, "beta_range": 1.0}
        phi = Modulator(columns, groups, **settings, **more)
        for dtype, name in ((torch.float32, "*fp32"), (torch.float64, "*fp64")):
            plan = Weights.of(phi.to(dtype)).plan(groups)
            if plan is not None:
                yield kernels.modulate, plan, name


for capability in map(int, sys.argv[1:]):
    for kernel, constants, phi in variants():
        options = {"num_warps": constants["num_warps"]} if "num_warps" in constants else {}
        constants = {name: value for name, value in constants.items() if name != "num_warps"}
        types = {
            name: "constexpr" if name in constants else TYPES.get(name, NUMBERS if name in TABLES else phi)
            for name in kernel.arg_names
        }
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(ASTSource(kernel, types, places), target=target, options=options)
        facts = {"kernel": kernel.__name__, "capability": capability, "constants": repr(constants)}
        print(json.dumps(facts | {"bytes": len(compiled.asm["cubin"]), "shared": compiled.metadata.shared}), flush=True)

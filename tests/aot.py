"""Compiles every Triton kernel as the ops launch it, for GPUs that are not here.

    python -m tests.aot                  # a table: registers, spills, shared memory, seconds, loops
    python -m tests.aot --json           # the same as a JSON line a kernel, for test_kernels_aot.py
    python -m tests.aot --only topk      # the kernels whose name or case holds this

Tensors are on the meta device: nothing is computed. TRITON_INTERPRET must be unset.
C rows of a chunk, V vocabulary, K entries a row.
"""

import argparse
import json
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import topk, triton_dense, triton_loss
from kernels.backends import MAX_ENTRIES
from kernels.checks import LossSpec
from kernels.chunks import ALIGNMENT
from kernels.torch_loss import DenseTargets, LogProbsSpec, Targets

KERNELS = (
    (triton_loss, "loss_kernel"),
    (triton_loss, "log_probs_kernel"),
    (triton_loss, "log_probs_grad_kernel"),
    (triton_dense, "dense_kernel"),
    (topk, "topk_kernel"),
)
SHAPES = ((50304, 64), (128256, 64), (151936, 128))  # V and K of the benchmark
ARCHS = (80, 90, 100)
C = 64
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Launch(NamedTuple):
    """What Triton compiles a kernel for."""

    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: dict
    aligned: tuple[str, ...]  # arguments that 16 divides
    options: dict

    def compile(self, arch: int):
        names = list(self.signature)
        constants = {(names.index(name),): value for name, value in self.constants.items()}
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in self.aligned}
        source = ASTSource(self.kernel, self.signature, constants, aligned)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=self.options)


class Recorder:
    """Stands in for a kernel and notes how it is launched."""

    case = ""  # what is being launched
    launches: dict[str, tuple[str, Launch]] = {}  # noqa: RUF012 - shared by all recorders

    def __init__(self, kernel: triton.JITFunction):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.record

    def record(self, *arguments, **constants) -> None:
        names = [parameter.name for parameter in self.kernel.params]
        options = {key: constants.pop(key) for key in list(constants) if key not in names}
        signature, aligned = {}, []
        for name, value in zip(names, arguments, strict=False):
            if isinstance(value, Tensor):
                signature[name] = TYPES[value.dtype]
                aligned.append(name)
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value is None or value == 1:  # specialised, as triton.jit does
                constants[name] = value
            else:
                signature[name] = "i32" if value < 2**31 else "i64"
                if value % 16 == 0:
                    aligned.append(name)
        signature = {name: signature.get(name, "constexpr") for name in names}
        launch = Launch(self.kernel, signature, constants, tuple(aligned), options)
        self.launches.setdefault(str(launch), (self.case, launch))


# What is compiled.


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def chunk_of_logits(V: int) -> Tensor:
    """As `Head` lays it out on CUDA."""
    padded = triton.cdiv(V, ALIGNMENT) * ALIGNMENT
    return empty(C, padded)[:, :V]


def sparse_loss(V: int, K: int, given: torch.dtype | None = None, **options) -> None:
    """The loss of a chunk and its bf16 gradient over it, or of given logits and theirs elsewhere."""
    labels = empty(C, dtype=torch.int64) if options.get("kl_weight", 1) < 1 else None
    targets = Targets(empty(C, K, dtype=torch.int32), empty(C, K), labels, empty(C))
    if given is None:
        z = chunk_of_logits(V)
        grad = triton_loss.narrowed(z, torch.bfloat16)
    else:
        z = empty(C, V, dtype=given)
        grad = torch.empty_like(z)
    spec = LossSpec(**options)
    triton_loss.sparse_losses(z, targets, spec, empty(C, 5), grad, keep_logits=given is not None)


def dense_loss(V: int, from_cache: bool, **options) -> None:
    """The loss against a teacher's logits, or against cached log-probabilities."""
    z = chunk_of_logits(V)
    scores = empty(C, V, dtype=torch.float16) if from_cache else chunk_of_logits(V)
    log_norm = empty(C) if from_cache else None
    targets = DenseTargets(scores, log_norm, empty(C, dtype=torch.int64), empty(C))
    grad = triton_loss.narrowed(z, torch.bfloat16)
    triton_dense.dense_losses(z, targets, LossSpec(**options), empty(C, 5), grad)


def log_probs(V: int, K: int) -> None:
    z = chunk_of_logits(V)
    ids = empty(C, K, dtype=torch.int64)
    spec = LogProbsSpec(1.0, None)
    grad = triton_loss.narrowed(z, torch.bfloat16)
    triton_loss.log_probs_of(z, ids, spec, empty(C, K), empty(C))
    triton_loss.log_probs_gradient(z, ids, spec, empty(C, K), empty(C), grad)


def select(V: int, k: int, temperatures: tuple[float, ...]) -> None:
    topk.triton_chunk(chunk_of_logits(V), k, temperatures, None)


def cases() -> list[tuple]:
    """(function, V, ...) and keyword options."""
    found = []
    for V, K in SHAPES:
        for entries in (K, 1024, MAX_ENTRIES):
            found.append(((sparse_loss, V, entries), {"kl_weight": 0.5}))
            found.append(((log_probs, V, entries), {}))
        for divergence in ("forward_kl", "jsd"):
            options = {"kl_weight": 0.5, "temperature": 2.0, "divergence": divergence}
            found.append(((sparse_loss, V, MAX_ENTRIES), options))
            found.append(((dense_loss, V, False), options))
        found.append(((sparse_loss, V, 0), {"kl_weight": 0.0, "tail": "truncate"}))
        for k in (K, topk.MAX_SELECTED):
            found.append(((select, V, k, (1.0,)), {}))
            found.append(((select, V, k, (2.0, 4.0)), {}))
    smooth = {"kl_weight": 0.5, "temperature": 2.0, "tail": "smooth", "softcap": 30.0}
    for V, K in ((2048, 64), (50257, 64), (32000, 1024), (128256, MAX_ENTRIES)):
        found.append(((sparse_loss, V, K), {}))
        found.append(((sparse_loss, V, K), smooth))
        found.append(((dense_loss, V, True), {"kl_weight": 0.5, "softcap": 30.0}))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found.append(((sparse_loss, 50257, 64, dtype), {"kl_weight": 0.5}))
        found.append(((sparse_loss, 50304, MAX_ENTRIES, dtype), {"kl_weight": 0.5}))
    return found


# What comes of it.


def sass_loops(sass: str) -> list[dict]:
    """The loops over a row: what they hold, and the order of their loads, barriers and stores."""
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    places = {int(address, 16): place for place, (address, _) in enumerate(code)}
    loops = []
    for place, (_, line) in enumerate(code):
        jump = re.search(r"BRA\S*\s.*?0x([0-9a-f]+)", line)
        start = places.get(int(jump[1], 16), place) if jump else place
        body = [text for _, text in code[start : place + 1]]
        exponentials = sum("MUFU.EX2" in text for text in body)
        if start >= place or exponentials < 8:
            continue
        memory = re.findall("LDG|BAR|STG", " ".join(body))
        wide = all(".128" in text for text in body if "LDG" in text)
        order = "".join({"LDG": "L", "BAR": "B", "STG": "S"}[name] for name in memory)
        loops.append({"order": order, "wide": wide, "length": len(body)})
    return loops


def facts(case: str, launch: Launch, arch: int) -> dict:
    """What the compiler says of a kernel."""
    started = time.perf_counter()
    binary = launch.compile(arch)
    seconds = time.perf_counter() - started
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [cuobjdump, "-res-usage", "-sass", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "kernel": launch.kernel.__name__,
        "arch": arch,
        "case": case,
        "registers": int(re.search(r"REG:(\d+)", dump)[1]),
        "stack": int(re.search(r"STACK:(\d+)", dump)[1]),  # spills lie there
        "shared": binary.metadata.shared,
        "warps": binary.metadata.num_warps,
        "overlaps": launch.constants.get("OVERLAPS", False),
        "seconds": round(seconds, 1),
        "loops": sass_loops(dump),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="")
    options = parser.parse_args()

    for module, name in KERNELS:
        setattr(module, name, Recorder(getattr(module, name)))
    for (function, *arguments), keywords in cases():
        Recorder.case = f"{function.__name__} {arguments} {keywords}"
        function(*arguments, **keywords)

    for case, launch in Recorder.launches.values():
        if options.only not in f"{launch.kernel.__name__} {case}":
            continue
        for arch in ARCHS:
            row = facts(case, launch, arch)
            if options.json:
                print(json.dumps(row), flush=True)
                continue
            orders = " ".join(loop["order"] + "!" * (not loop["wide"]) for loop in row["loops"])
            form = "{kernel:21} sm_{arch:<4} {registers:4} {stack:5} {shared:6} {seconds:5} "
            print(form.format(**row), orders, case, flush=True)


if __name__ == "__main__":
    main()

"""Compiles every Triton kernel as the ops launch it, for GPUs that are not here.

    python -m tests.aot                  # a table: registers, stack, shared memory, seconds, loops
    python -m tests.aot --json           # a JSON line a kernel, for test_kernels_aot.py
    python -m tests.aot --only topk      # only what holds this text

A loop over a row is shown as its loads (L), barriers (B) and stores (S), with ! where a load is not
of 16 bytes. Spilled registers lie on the stack. Tensors are on the meta device: nothing is
computed. TRITON_INTERPRET must be unset. C rows of a chunk, V vocabulary, K entries a row.
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
OTHER_SHAPES = (
    (2048, 64),
    (32000, 1024),
    (50257, 64),
    (128256, MAX_ENTRIES),
)
ARCHS = (80, 90, 100)
SHAPES = (  # V and K of the benchmark
    (50304, 64),
    (128256, 64),
    (151936, 128),
)
C = 64
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
ALIGNED = [["tt.divisibility", 16]]


class Launch(NamedTuple):
    """What Triton compiles a kernel for."""

    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: dict
    aligned: list[str]  # arguments that 16 divides
    options: dict

    def compile(self, arch: int):
        places = {name: (place,) for place, name in enumerate(self.signature)}
        source = ASTSource(
            self.kernel,
            self.signature,
            {places[name]: value for name, value in self.constants.items()},
            {places[name]: ALIGNED for name in self.aligned},
        )
        target = GPUTarget("cuda", arch, 32)
        return triton.compile(source, target=target, options=self.options)


class Recorder:
    """Stands in for a kernel and notes how it is launched."""

    launches: dict[str, tuple[Launch, str]] = {}  # noqa: RUF012 - of all recorders

    def __init__(self, kernel: triton.JITFunction):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.record

    def record(self, *arguments, **keywords) -> None:
        names = [parameter.name for parameter in self.kernel.params]
        signature = dict.fromkeys(names, "constexpr")
        launch = Launch(self.kernel, signature, {}, [], {})
        case = [TYPES[arguments[0].dtype]]
        for name, value in zip(names, arguments, strict=False):
            specialize(launch, name, value)
            if not isinstance(value, Tensor):
                case.append(f"{name}={value}")
        for name, value in keywords.items():
            case.append(f"{name}={value}")
            group = launch.constants if name in names else launch.options
            group[name] = value
        entry = launch, " ".join(case)
        self.launches.setdefault(str(launch), entry)


def specialize(launch: Launch, name: str, value) -> None:
    """Notes an argument as triton.jit does: its type, whether 16 divides it, None, 1."""
    if isinstance(value, Tensor):
        launch.signature[name] = TYPES[value.dtype]
        launch.aligned.append(name)
    elif isinstance(value, float):
        launch.signature[name] = "fp32"
    elif value is None or value == 1:
        launch.constants[name] = value
    else:
        launch.signature[name] = "i32"
        if value % 16 == 0:
            launch.aligned.append(name)


# What is launched.


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def chunk_of_logits(V: int) -> Tensor:
    """As `Head` lays it out on CUDA."""
    padded = triton.cdiv(V, ALIGNMENT) * ALIGNMENT
    return empty(C, padded)[:, :V]


def sparse_loss(
    V: int,
    K: int,
    given: torch.dtype | None = None,
    **options,
) -> None:
    """Of a chunk and its bf16 gradient over it, or of given logits and theirs elsewhere."""
    ids = empty(C, K, dtype=torch.int32)
    labels = empty(C, dtype=torch.int64) if "kl_weight" in options else None
    targets = Targets(ids, empty(C, K), labels, empty(C))
    z = chunk_of_logits(V)
    grad = triton_loss.narrowed(z, torch.bfloat16)
    if given is not None:
        z = empty(C, V, dtype=given)
        grad = torch.empty_like(z)
    keep_logits = given is not None
    spec = LossSpec(**options)
    fields = empty(C, 5)
    triton_loss.sparse_losses(z, targets, spec, fields, grad, keep_logits)


def dense_loss(
    V: int,
    scores: Tensor,
    log_norm: Tensor | None = None,
    **options,
) -> None:
    z = chunk_of_logits(V)
    grad = triton_loss.narrowed(z, torch.bfloat16)
    labels = empty(C, dtype=torch.int64)
    targets = DenseTargets(scores, log_norm, labels, empty(C))
    spec = LossSpec(**options)
    triton_dense.dense_losses(z, targets, spec, empty(C, 5), grad)


def log_probs(V: int, K: int) -> None:
    z = chunk_of_logits(V)
    grad = triton_loss.narrowed(z, torch.bfloat16)
    ids = empty(C, K, dtype=torch.int64)
    spec = LogProbsSpec(1.0, None)
    triton_loss.log_probs_of(z, ids, spec, empty(C, K), empty(C))
    triton_loss.log_probs_gradient(z, ids, spec, empty(C, K), empty(C), grad)


def launch_everything() -> None:
    ce = {"kl_weight": 0.5}
    smooth = {**ce, "temperature": 2.0, "tail": "smooth", "softcap": 30.0}
    for V, K in SHAPES:
        for entries in (K, 1024, MAX_ENTRIES):
            sparse_loss(V, entries, **ce)
            log_probs(V, entries)
        for divergence in ("forward_kl", "jsd"):
            options = {**ce, "temperature": 2.0, "divergence": divergence}
            sparse_loss(V, MAX_ENTRIES, **options)
            dense_loss(V, chunk_of_logits(V), **options)
        sparse_loss(V, 0, kl_weight=0.0, tail="truncate")
        for k in (K, topk.MAX_SELECTED):
            topk.triton_chunk(chunk_of_logits(V), k, (1.0,), None)
            topk.triton_chunk(chunk_of_logits(V), k, (2.0, 4.0), 30.0)
    # Every launch shape, and V that 16 does not divide.
    for V, K in OTHER_SHAPES:
        sparse_loss(V, K)
        sparse_loss(V, K, **smooth)
        cached = empty(C, V, dtype=torch.float16)
        dense_loss(V, cached, empty(C), softcap=30.0, **ce)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        sparse_loss(50257, 64, dtype, **ce)
        sparse_loss(50304, MAX_ENTRIES, dtype, **ce)


# What comes of it.


def loops_over_rows(sass: str) -> list[str]:
    """The loads, barriers and stores of each loop that has a thread's exponentials."""
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    places = {address.lstrip("0"): place for place, (address, _) in enumerate(code)}
    loops = []
    for end, (_, instruction) in enumerate(code):
        jump = re.search(r"BRA.*0x([0-9a-f]+)", instruction)
        start = places.get(jump[1], end) if jump else end
        body = [text for _, text in code[start:end]]
        if sum("MUFU.EX2" in text for text in body) < 4:
            continue
        names = re.findall("LDG|BAR|STG", " ".join(body))
        order = "".join(name[0] for name in names)
        narrow = any("LDG" in text and ".128" not in text for text in body)
        loops.append(order + "!" * narrow)
    return loops


def facts(launch: Launch, arch: int) -> dict:
    """What the compiler says of a kernel."""
    started = time.perf_counter()
    binary = launch.compile(arch)
    seconds = time.perf_counter() - started
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [tool, "-res-usage", "-sass", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    dump = done.stdout
    return {
        "kernel": launch.kernel.__name__,
        "arch": arch,
        "registers": int(re.search(r"REG:(\d+)", dump)[1]),
        "stack": int(re.search(r"STACK:(\d+)", dump)[1]),
        "shared": binary.metadata.shared,
        "warps": binary.metadata.num_warps,
        "seconds": round(seconds, 1),
        "loops": loops_over_rows(dump),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="")
    options = parser.parse_args()

    for module, name in KERNELS:
        setattr(module, name, Recorder(getattr(module, name)))
    launch_everything()
    for launch, case in Recorder.launches.values():
        if options.only not in f"{launch.kernel.__name__} {case}":
            continue
        for arch in ARCHS:
            row = facts(launch, arch)
            if options.json:
                print(json.dumps({**row, "case": case}), flush=True)
                continue
            form = "{kernel:21} sm_{arch:<4} {registers:4} {stack:4} {shared:6} {seconds:5}"
            print(form.format(**row), *row["loops"], case, flush=True)


if __name__ == "__main__":
    main()

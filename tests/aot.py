"""Compiles every Triton kernel ahead of time, as the ops launch it at the benchmark's shapes, for GPUs that are not here.

python -m tests.aot                 # a table: registers, spills, shared memory, vector loads; the row kernel's inner loop
python -m tests.aot --json          # the same, a JSON line a kernel (tests/test_aot.py reads these)

Tensors are on the meta device: nothing is computed. TRITON_INTERPRET must be unset.
"""

import argparse
import importlib
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import exp_kernel, row_kernel
from kernels.common import Spec
from kernels.tile import Head, Targets

linear_sample, linear_topk = (importlib.import_module(f"kernels.{name}") for name in ("linear_sample", "linear_topk"))
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
ARCHS = (80, 90, 100)
SHAPES = ((16384, 768, 50304, 64), (8192, 2048, 128256, 64), (8192, 4096, 151936, 128))
# clock under load (a guess), memory bytes a second (data sheets)
CARDS = {"H100": (1.755e9, 3.35e12), "H200": (1.755e9, 4.8e12)}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
TYPES |= {torch.float64: "fp64"}


class Recorder:
    """Stands for a kernel: a launch is compiled instead, for every target."""

    found = {}  # noqa: RUF012 - shared by all recorders

    def __init__(self, kernel):
        self.kernel, self.names = kernel, [part.name for part in kernel.params]

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *arguments, num_warps=4, num_stages=3, maxnreg=None, **constants):
        signature, attributes = {}, {}
        for place, (name, value) in enumerate(zip(self.names, arguments, strict=False)):
            if isinstance(value, torch.Tensor):
                signature[name], attributes[(place,)] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value is None or (value == 1 and isinstance(value, int)):  # as triton.jit specialises them
                signature[name], constants = "constexpr", constants | {name: value}
            else:
                signature[name] = "i32" if value < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(place,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(constants, "constexpr")
        places = {(self.names.index(name),): value for name, value in constants.items()}
        for arch in ARCHS:
            key = (self.kernel.__name__, arch, json.dumps([signature, str(constants), str(attributes), num_warps, num_stages]))
            if key not in self.found:
                source = ASTSource(self.kernel, {name: signature[name] for name in self.names}, places, attributes)
                options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
                self.found[key] = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def tool(name: str, *flags: str, data: bytes) -> str:
    """What one of Triton's bundled programs prints of a file."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        done = subprocess.run([TOOLS / name, *flags, file.name], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr


def facts(key: tuple, binary) -> dict:
    """What the compiler says of a kernel: registers a thread, spilled bytes, shared memory, widest accesses."""
    ptx, arch = binary.asm["ptx"], re.search(r"\.target (\S+?),?\s", binary.asm["ptx"])[1]
    usage = tool("ptxas-blackwell" if key[1] >= 100 else "ptxas", "-v", f"-arch={arch}", "-o", "/dev/null", data=ptx.encode())
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", usage)))
    row = {"kernel": key[0], "arch": key[1], "registers": int(re.search(r"Used (\d+) registers", usage)[1]), "spilled": spilled}
    row |= {"shared": binary.metadata.shared, "warps": binary.metadata.num_warps, "key": key[2]}
    sixteen = r"(?:ld|st)\.global\S*\.v4\.b32|cp\.async\.\w+\.shared\S*\.global\S* \[[^]]*\], \[[^]]*\], 0x10"
    row["wide"] = len(re.findall(sixteen, ptx))
    return row | {"matrix": re.findall(r"wgmma|mma\.sync|tcgen05", ptx)[:1], "loops": inner_loops(binary)}


def inner_loops(binary) -> list[dict]:
    """The unmasked loops over a row, in the SASS: instructions, exponentials and 16-byte loads' bytes of one turn of a thread,
    and the order of its loads (L), barriers (B) and stores (S)."""
    lines = tool("nvdisasm", "-c", data=binary.asm["cubin"]).splitlines()
    places = {line.strip()[:-1]: number for number, line in enumerate(lines) if re.match(r"\s*\.L_x_\d+:", line)}
    loops = []
    for number, line in enumerate(lines):
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if jump and places.get(jump[1], number) < number:
            body = [part for part in lines[places[jump[1]] : number + 1] if re.search(r"/\*[0-9a-f]{4,}\*/\s+\S", part)]
            loads = [part for part in body if "LDG" in part]
            if loads and all(".128" in part for part in loads):
                kinds = "".join("L" if "LDG" in p else "S" if "STG" in p else "B" if "BAR." in p else "" for p in body)
                loop = {"order": kinds, "instructions": len(body), "bytes": 16 * len(loads)}
                loops.append(loop | {"ex2": sum("MUFU.EX2" in part for part in body)})
    return loops


def roofline(loop: dict, size: int, written: float, V: int = 50304, N: int = 16384) -> str:
    """The least times of a pass over N*V logits of `size` bytes, from its instructions, exponentials and bytes."""
    each = loop["bytes"] // size  # elements a thread takes in one turn
    text = f"{loop['instructions'] / each:.2f} instructions, {loop['ex2'] / each:.0f} ex2"
    text += f", {size} + {written:.0f} bytes an element"
    for card, (clock, bandwidth) in CARDS.items():
        unit = N * V * 1e3 / (each * 132 * clock)
        times = (unit * loop["instructions"] / 128, unit * loop["ex2"] / 16, N * V * (size + written) * 1e3 / bandwidth)
        text += "; {}: issue {:.2f}, ex2 {:.2f}, memory {:.2f} ms".format(card, *times)
    return text


def launch_everything() -> None:
    """Every launch that the ops make at the benchmark's shapes, in the modes that it times and the widest others."""
    modules = ((row_kernel, "row_kernel"), (linear_topk, "topk_kernel"), (linear_sample, "sample_kernel"))
    modules += tuple((exp_kernel, name) for name in ("product_kernel", "finish_kernel", "fill_kernel"))
    for module, name in modules:
        setattr(module, name, Recorder(getattr(module, name)))
    for N, D, V, K in SHAPES:
        for k in (K, 1024):
            once(N, D, V, k)
    for V, dtype in ((50257, torch.bfloat16), (50257, torch.float16), (151936, torch.bfloat16), (128256, torch.float32)):
        z, targets = empty(64, V, dtype=dtype), targets_of(64, 64)
        row_kernel.launch(z, empty(64, 5), targets, Spec(kl_weight=0.5), torch.empty_like(z), own=False)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def targets_of(c: int, K: int) -> Targets:
    return Targets(empty(c, K, dtype=torch.int32), empty(c, K), empty(c, dtype=torch.int64), empty(c))


def once(N: int, D: int, V: int, K: int) -> None:
    hidden, weight = (empty(n, D, dtype=torch.bfloat16) for n in (N, V))
    head = Head(hidden, weight, (True, True), dtype=torch.bfloat16, aligned=True)
    tile, targets = head.tile, targets_of(len(head.tile), K)
    c, out, place = len(tile), empty(len(tile), 5), slice(0, len(tile))
    grad = row_kernel.narrowed(tile, torch.bfloat16)
    for kind in ("forward_kl", "jsd"):
        for spec in (Spec(kl_weight=0.5, divergence=kind), Spec(kl_weight=0.5, temperature=2.0, divergence=kind)):
            row_kernel.launch(tile, out, targets, spec, grad)
    row_kernel.launch(tile, out, targets, Spec(kl_weight=0.5, softcap=30.0, tail="smooth"), grad)
    row_kernel.launch(tile, out, targets_of(c, 0), Spec(kl_weight=0.0), grad)
    given = Targets(targets.ids, empty(c, K + 1), None, out)
    row_kernel.launch(tile, given.log_probs, given, Spec(tail="log_probs"))
    row_kernel.launch(tile, given.log_probs, given, Spec(tail="given"), grad)
    exp_kernel.launch(head, place, targets, Spec(kl_weight=0.5), out)
    for softcap in (None, 30.0):
        linear_sample.launch(tile, empty(c, K, dtype=torch.float64), empty(c, 2), targets.ids, targets.log_probs, softcap)
    targets = targets_of(c, min(K, 256))
    for temperatures in ([1.0], [1.0, 2.0]):
        norms = empty(c, len(temperatures))
        for sums in (None, exp_kernel.product(*head.operands(place), tile)):
            linear_topk.launch(tile, sums, targets.ids, targets.log_probs, norms, temperatures, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    launch_everything()
    for key, binary in Recorder.found.items():
        row = facts(key, binary)
        if as_json:
            print(json.dumps(row))
        else:
            form = "{kernel:14} sm_{arch:<4} {registers:4} registers {spilled:4} spilled {shared:7} shared {wide:3} wide"
            print(form.format(**row))
    for key, binary in Recorder.found.items():
        if not as_json and key[:2] == ("row_kernel", 90) and "'GRAD': True" in key[2] and "'forward_kl'" in key[2]:
            flags = dict(re.findall(r"'(\w+)': ([\w.']+)", key[2]))
            size, ratio = (2 if "int16" in flags["WORD"] else 4), int(flags["RATIO"])
            shown = " ".join(f"{name}={flags[name]}" for name in ("TAIL", "TWO", "ALIGNED"))
            print(f"\nrow_kernel, predicted: {shown}")
            for turn, loop in enumerate(inner_loops(binary)):
                print(f"  pass {turn + 1}: {roofline(loop, size, turn * size / ratio)}")


if __name__ == "__main__":
    main()

"""Where a chunk's time goes on a GPU: products by the dtype they write, kernels by launch shape.

python -m tests.bench_chunk [SECONDS]    # results/kernels_h100_chunk.txt is an output of it
"""

import sys
import time

import torch
from triton.testing import do_bench

from kernels import topk, triton_dense, triton_loss
from kernels.bench.__main__ import GPU_SHAPES
from kernels.bench.cases import Problem
from kernels.checks import LossSpec
from kernels.chunks import Head, add_product
from kernels.torch_loss import DenseTargets, Targets

# BLOCK, num_warps and maxnreg of the loss kernels; the same of top-k
LOSS_LAUNCHES = [
    (2048, 8, 255),
    (4096, 16, 128),
    (8192, 16, 128),
    (4096, 32, 64),
    (8192, 32, 64),
]
TOPK_LAUNCHES = [(4096, 8, 128), (4096, 4, None), (8192, 16, None)]
BYTES_PER_MS = 3.0e9  # of an H100, as a device-to-device copy shows it


def show(name, call):
    """Prints the median milliseconds of a call, or why it failed; goes on."""
    try:
        ms = do_bench(call, warmup=5, rep=25, return_mode="median")
        print(f"  {name:40} {ms:8.3f} ms", flush=True)
    except Exception as error:  # not passed over: it is printed
        print(f"  {name:40} {error!r:.100}", flush=True)


def products(head: Head, rows: slice, grad: torch.Tensor):
    """A chunk's three products as the ops make them, then with outputs in bf16."""
    hidden = head.hidden[rows]
    weight = head.weight
    narrow = torch.randn(grad.shape, device="cuda").bfloat16()
    d_hidden = head.d_hidden[rows]
    calls = {
        "logits, fp32": lambda: head.logits(rows),
        "logits, bf16": lambda: torch.mm(hidden, weight.t(), out=narrow),
        "d_hidden, fp32": lambda: add_product(d_hidden, grad, weight, False, head.mixed),
        "d_hidden, bf16": lambda: torch.mm(narrow, weight),
        "d_weight, fp32, added": lambda: add_product(
            head.d_weight, grad.t(), hidden, True, head.mixed
        ),
        "d_weight, bf16": lambda: torch.mm(narrow.t(), hidden),
    }
    for name, call in calls.items():
        show(name, call)


def try_launches(name, module, launches, call):
    """The call with each launch shape of a module in the place of its own."""
    own = module.launch_shape
    for launch in launches:
        module.launch_shape = lambda *_, launch=launch: launch
        show(f"{name} {launch}", call)
    module.launch_shape = own


def chunk(shape, deadline: float):
    """All of one shape; what is still to do at the deadline is left out."""
    p = Problem(*shape, torch.bfloat16, torch.device("cuda"))
    head = Head(p.hidden.detach(), p.weight.detach(), torch.bfloat16, needs=(True, True))
    rows = next(head.chunks())
    z = head.logits(rows)
    C, V = z.shape
    grad = triton_loss.narrowed(z, torch.bfloat16)
    print(f"N, D, V, K = {shape}: {C} rows", flush=True)
    print(f"  two reads and a write of the row kernel   {C * V * 10 / BYTES_PER_MS:8.3f} ms")
    weights = torch.full((C,), 1 / C, device="cuda")
    fields = torch.empty(C, 5, device="cuda")
    sparse = Targets(
        p.ids[rows],
        p.log_probs[rows],
        p.labels[rows],
        weights,
    )
    dense = DenseTargets(z.clone(), None, p.labels[rows], weights)
    spec = LossSpec(kl_weight=0.5)

    def sparse_losses():
        triton_loss.sparse_losses(z, sparse, spec, fields, grad)

    def dense_losses():
        triton_dense.dense_losses(z, dense, spec, fields, grad)

    def top():
        topk.triton_chunk(z, p.K, [1.0], None)

    work = [
        lambda: products(head, rows, grad),
        lambda: try_launches("loss_kernel", triton_loss, LOSS_LAUNCHES, sparse_losses),
        lambda: try_launches("topk_kernel", topk, TOPK_LAUNCHES, top),
        lambda: show("torch.topk", lambda: z.topk(p.K)),
        lambda: try_launches("dense_kernel", triton_loss, LOSS_LAUNCHES, dense_losses),
    ]
    for step in work:
        if time.monotonic() < deadline:
            head.logits(rows)
            step()


def main():
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60
    deadline = time.monotonic() + seconds
    print(torch.cuda.get_device_name(), torch.__version__)
    for shape in GPU_SHAPES:
        chunk(shape, deadline)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

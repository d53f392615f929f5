"""Ahead-of-time compilation of every kernel for sm_80, sm_90 and sm_100, as the ops launch it: see aot.py."""

import json
import os
import re
import subprocess
import sys

import pytest

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a program may have
MATRIX = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


def run(*command):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_every_kernel_compiles_without_spills_and_reads_sixteen_bytes_at_a_time():
    done = run("-m", "tests.aot", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    names = {"row_kernel", "topk_kernel", "sample_kernel", "product_kernel", "finish_kernel", "fill_kernel"}
    assert {(row["kernel"], row["arch"]) for row in rows} == {(name, arch) for name in names for arch in SHARED}
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["shared"] <= SHARED[row["arch"]], row
        if row["kernel"] == "product_kernel":
            assert row["matrix"] == [MATRIX[row["arch"]]], row
        if row["kernel"] == "row_kernel":  # both passes' loops, at every V, and at 50257 where rows start anywhere
            passes = [loop for loop in row["loops"] if loop["ex2"] >= 8]
            assert row["wide"] and len(passes) == (2 if "'GRAD': True" in row["key"] else 1), row
            for loop in passes:  # a narrow gradient lies where logits were: no thread may write before all have read
                if "S" in loop["order"] and "'RATIO': 2" in row["key"]:
                    assert re.fullmatch("L+B+S+", loop["order"]), row
    assert any("'ALIGNED': False" in row["key"] for row in rows)


def test_without_a_gpu_and_the_interpreter_triton_is_refused_in_one_line():
    code = """if True:
        import torch
        from kernels import linear_topk
        try:
            linear_topk(torch.zeros(2, 4), torch.zeros(8, 4), 2, backend="triton")
        except ValueError as error:
            print(error)
    """
    out = run("-c", code).stdout
    assert out == (
        "backend='triton': the tensors are on cpu: Triton needs CUDA (or TRITON_INTERPRET=1); use backend='torch' or 'auto'\n"
    )

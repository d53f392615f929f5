#!/usr/bin/env bash
# Fetches the packages that a bare GPU machine lacks into tests/wheels, which git ignores and
# tests/gpu.sh installs there:
#
#   bash tests/gpu_wheels.sh
#
# That machine has Python 3.12 on x86-64, torch, triton, numpy, tiktoken, transformers, safetensors,
# rich, matplotlib, pytest and pytest-xdist, and no network. wandb is not among them: train.py
# imports it only when it is asked for.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=tests/wheels
rm -rf "$folder"
mkdir "$folder"

# What train.py imports, in the versions that this repository pins, then the rivals that
# kernels.bench measures.
packages=(hydra-core omegaconf rustbpe)
rivals=(liger-kernel==0.8.5 cut-cross-entropy==25.1.1)
python3 -m pip download --quiet --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp \
    --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 \
    --constraint constraints.txt --dest "$folder" "${packages[@]}" "${rivals[@]}"

# Hydra's parser is published as source alone; it is pure Python, so a wheel built here fits there.
python3 -m pip wheel --quiet --no-deps \
    --constraint constraints.txt --wheel-dir "$folder" antlr4-python3-runtime

ls -l "$folder"
du -sh "$folder"

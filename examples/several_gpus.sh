#!/usr/bin/env bash
# A recipe on all GPUs of one machine, or on GPUS of them: each process has the whole model and takes
# its share of every step. A run that was cut off goes on, with as many processes as before.
#     examples/several_gpus.sh recipe.yaml [key=value ...]
set -euo pipefail
processes=${GPUS:-$(nvidia-smi -L | wc -l)}
exec torchrun --standalone --nproc-per-node="$processes" -m xplus_fast train "$@"

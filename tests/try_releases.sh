#!/usr/bin/env bash
# The quick tests, those of every family, and a real lm_eval run under each attention, in the environment that the argument names.
set -euo pipefail
bin=$1/bin
"$bin/python" -c 'import sys; print("Python", sys.version.split()[0])'
"$bin/python" -m pip freeze | grep -iE '^(torch|transformers|lm[-_]eval|accelerate|datasets|peft|numpy)=='
OMP_NUM_THREADS=1 "$bin/python" -m pytest -n auto --dist loadgroup -m "not slow or families"
model=$("$bin/lminf" demo --print-model 2>/dev/null)
for attention in lambda,n_local=2048 full; do
    table=$("$bin/lm_eval" --model lminf --model_args "pretrained=$model,attention=$attention" --tasks passkey_4k --limit 2)
    echo "$table"
    grep -q '^|passkey_4k' <<<"$table"
done

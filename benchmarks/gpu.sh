#!/usr/bin/env bash
# A step, a prompt and an epoch on a GPU whose machine has JAX, but neither Keras, TensorFlow nor a network.
#   benchmarks/gpu.sh pack [3.12]   here, after `dvc repro sequences`: wheels for its Python, the
#                                   tokenizer and token windows, into .gpu/ (some 32 MB), to carry along
#   benchmarks/gpu.sh               there: at most 8 minutes
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ "${1:-}" = pack ]; then
  rm -rf .gpu && mkdir .gpu
  for name in keras namex optree packaging omegaconf antlr4-python3-runtime pydantic pydantic-core annotated-types \
    typing-extensions typing-inspection; do
    wanted=$(grep -o "^$name==[^ ;]*" requirements.lock)
    # One of them is published as source only; it is plain Python.
    "$python" -m pip --disable-pip-version-check download -q --no-deps --only-binary=:all: -d .gpu \
      --implementation cp --python-version "${2:-3.12}" --platform manylinux_2_28_x86_64 \
      --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 "$wanted" 2>/dev/null ||
      "$python" -m pip --disable-pip-version-check wheel -q --no-deps -w .gpu "$wanted"
  done
  PYTHONPATH=src "$python" -m benchmarks.gpu pack
  du -sh .gpu
else
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .gpu/*.whl
  PYTHONPATH=$site:src KERAS_BACKEND=jax PYTHONUNBUFFERED=1 timeout 450 "$python" -m benchmarks.gpu
fi

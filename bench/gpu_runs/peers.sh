# `source bench/gpu_runs/peers.sh` from the repository root: puts the peers under .peers on PYTHONPATH, as README.md says.
# Wheels, if there are any, are installed to /tmp/site once: for a machine that reaches no package index.
peers="$(pwd)/.peers"
[ -d "$peers/xma" ] || { echo "peers.sh: source me from the repository root, with $peers/xma there" >&2; return 1; }
if ls "$peers"/wheels/*.whl >/dev/null 2>&1 && [ ! -e /tmp/site/.peers ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site "$peers"/wheels/*.whl \
    && touch /tmp/site/.peers || return 1
fi
export PYTHONPATH="$(pwd):$peers/xma:$peers/fla:$peers/mamba:$peers/flashrnn:/tmp/site${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# FlashRNN's CUDA backend looks for the compiler here.
if [ -z "${CUDA_HOME:-}" ] && command -v nvcc >/dev/null; then
  export CUDA_HOME="$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")"
fi

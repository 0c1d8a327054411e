# The full run on one GPU: from the repository root, with the peers in .peers (README.md beside this):
#   COMMIT=<git revision> STEPS='op sweep' bash bench/gpu_runs/full.sh
# Rows go to $OUT/*.jsonl one by one. Nothing starts after $LIMIT seconds, and what then runs gets SIGINT: it keeps its rows.
LIMIT=${LIMIT:-540} WARM=${WARM:-100} STEPS=${STEPS:-op sweep layer step check rnn}
mkdir -p "${OUT:=/tmp/m2rnn-bench}"
export OUT PYTHONUNBUFFERED=1 NO_COLOR=1
source bench/gpu_runs/peers.sh
log=$OUT/full.log
left() { echo $((LIMIT - SECONDS)); }
step() {  # step NAME ARGUMENTS...: one bench process; its table to stdout and the log, its progress to the log
  local name=$1; shift
  if [ "$(left)" -lt 12 ]; then echo "== $name: not started, ${SECONDS}s" | tee -a "$log"; return; fi
  echo "== $name from ${SECONDS}s" | tee -a "$log"
  timeout -s INT -k 15 "$(left)" python3 -m bench "$@" --commit "${COMMIT:-unknown}" --out "$OUT/$name.jsonl" 2>>"$log" \
    | tee -a "$log" | cut -c1-175
  echo "== $name done at ${SECONDS}s" | tee -a "$log"
}
# 0. Compile ahead what peers would compile one by one, on all cores: the authors' kernel and Gated DeltaNet take two minutes by
# themselves. Nothing is chosen here, on a busy GPU: the run tunes anew, from the cache.
shares=8
for i in $(seq 0 $((shares - 1))); do
  timeout "$WARM" python3 bench/gpu_runs/warm_xma.py $i $shares >>"$log" 2>&1 &
  timeout "$WARM" python3 bench/gpu_runs/warm_fla.py $i $shares >>"$log" 2>&1 &
done
for case in A:mamba2 C:mamba2 A,C,D:triton; do
  timeout "$WARM" python3 -m bench op --preset "${case%:*}" --T 512 --gate-steps 64 --provider "${case#*:}" \
    --mode forward+backward --runs 1 --out "/tmp/warm-${case/:/-}.jsonl" >>"$log" 2>&1 &
done
wait
echo "== warm at ${SECONDS}s" | tee -a "$log"
fast=triton,xma,fla-gdn,mamba2,sdpa
for name in $STEPS; do
  case $name in
    # The table: 20 runs of everything (budget 4 s a provider and mode: xma's 64 ms at C fit), gates on all steps.
    op) step op op --preset A,B,C,D --provider $fast --mode forward,forward+backward --budget 4 ;;
    # The plot: C's heads at 2k to 16k. The authors' kernel reads foreign memory at 32k, which ends a process.
    sweep) step sweep op --preset C --T 2048,4096,8192,16384 --provider triton,xma,fla-gdn,sdpa --mode forward+backward \
      --budget 6 --gate-steps 1024 ;;
    # The layer at A, compiled with fusion and not; the authors', Gated DeltaNet's and attention's beside it.
    layer) step layer layer --preset A --provider triton,triton-compile,xma,fla-gdn,sdpa \
      --mode inference,forward+backward ;;
    # One token.
    step) step step step --preset A ;;
    # Accuracy on all steps, in the order of what is likely to fit (A 15 s, D 15 s, B 15 s, C 37 s).
    check) step check check --preset A,D,B,C --dtype bf16 --clip 1 --provider triton ;;
    # Slow peers, few runs: cuDNN takes 60 to 530 ms a call. FlashRNN's Triton kernel did not compile with Triton 3.6.
    rnn) step rnn op --preset A,B,C,D --provider lstm,gru,flashrnn --mode forward,forward+backward --runs 5 --budget 0.5 ;;
    *) echo "full.sh: no step $name; there are op sweep layer step check rnn" >&2; exit 2 ;;
  esac
done
[ -s "$OUT/op.jsonl" ] && [ -s "$OUT/sweep.jsonl" ] && timeout 40 python3 -m bench report "$OUT/sweep.jsonl" "$OUT/op.jsonl" \
  --summary --provider triton,xma,fla-gdn,sdpa --plot "$OUT" 2>&1 | cut -c1-300
echo "== end at ${SECONDS}s"
ls -la "$OUT"

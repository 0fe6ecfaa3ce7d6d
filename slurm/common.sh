# shellcheck shell=bash disable=SC1091,SC2034
# Shared code that each job of this folder sources. Nothing to edit here.

cd "$SLURM_SUBMIT_DIR" || exit 1 # the project's root, where sbatch was called
if ! command -v deepspeed >/dev/null && [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi

# Jobs have no internet access; they use the files that `cap-llm prefetch` has downloaded.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1
FETCHED=${FETCHED:-$PWD/fetched}
if [ -d "$FETCHED" ]; then export HF_HOME=$FETCHED CAP_LLM_DATA=${CAP_LLM_DATA:-$FETCHED/data}; fi

# Compilation caches are private to this job on this node. A killed job may leave a shared cache
# locked, and another user could place a library at a predictable path.
[ -d "${TMPDIR:-/tmp}" ] || unset TMPDIR # inherited from a login node
CACHE=$(mktemp -d "${TMPDIR:-/tmp}/cap_llm-XXXXXXXXXX") || exit 1
export TORCH_EXTENSIONS_DIR=$CACHE/extensions TRITON_CACHE_DIR=$CACHE/triton
trap 'rm -rf "$CACHE"' EXIT

# The job stops before its time limit, which older versions of SLURM do not export.
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
  end=$(squeue -h -j "$SLURM_JOB_ID" -o %e 2>/dev/null) || true
  if [ -n "$end" ] && end=$(date -d "$end" +%s 2>/dev/null); then export SLURM_JOB_END_TIME=$end; fi
fi

export RANKS=${RANKS:-${SLURM_GPUS_ON_NODE:-1}} # ranks per node: one per GPU
# With --num_gpus alone, DeepSpeed's launcher uses the node's first GPUs instead of the job's.
GPUS=(--num_gpus "$RANKS")
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
  GPUS=(--include "localhost:$(cut -d, -f"1-$RANKS" <<<"$CUDA_VISIBLE_DEVICES")")
fi
export PORT=$((20000 + SLURM_JOB_ID % 12000)) # jobs on the same node need different ports

# run RUN COMMAND...: runs a command that writes to the run directory RUN, and forwards signals.
#
# SLURM sends USR1 to this shell before the time limit (--signal=B:USR1@300). The shell sends USR2 to
# all processes, because NCCL uses USR1. USR2 would kill the launchers, so they ignore it. The ranks
# finish their step, write a checkpoint together, and write the reason to RUN/ended.json, because a
# launcher's exit code does not contain it. Then the job is requeued and resumes.
# SLURM itself sends TERM (scancel, pre-emption) to all processes, and requeues pre-empted jobs.
run() {
  local folder=$1 code job
  shift
  rm -f "$folder/ended.json"
  (trap '' USR1 USR2 && exec "$@") &
  job=$!
  trap forward USR1
  trap 'true' TERM
  while wait "$job"; code=$?; kill -0 "$job" 2>/dev/null; do :; done # a signal interrupts wait, not the job
  trap '' USR1
  if grep -qs '"goes_on": true' "$folder/ended.json"; then
    requeue
  elif [ -f "$folder/ended.json" ]; then
    grep -o '"why": "[^"]*"' "$folder/ended.json"
    code=$(grep -o '"code": [0-9]*' "$folder/ended.json" | grep -o '[0-9]*')
  fi
  return "${code:-1}"
}

forward() {
  trap '' USR1 USR2
  kill -USR2 0
  # If the ranks are still running a minute before the limit, the job is requeued anyway.
  (sleep "${LAST_CALL:-240}" && requeue) &
}

requeue() {
  echo "requeueing the job, which will resume"
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60 # until SLURM ends this shell
}

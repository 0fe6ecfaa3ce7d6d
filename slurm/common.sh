# shellcheck shell=bash disable=SC1091,SC2034
# What the jobs of this folder share; each of them sources this file. Nothing to edit here.

cd "$SLURM_SUBMIT_DIR" || exit 1 # where sbatch was called: the root of the project
if ! command -v deepspeed >/dev/null && [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi

# No internet in a job. What `cap-llm prefetch` has put into one directory is found there.
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1
FETCHED=${FETCHED:-$PWD/fetched}
if [ -d "$FETCHED" ]; then export HF_HOME=$FETCHED CAP_LLM_DATA=${CAP_LLM_DATA:-$FETCHED/data}; fi

# Compilation caches are this job's on this node, for all its ranks: one that a killed job left locked
# would hang the next one, and another user could put a library where its name can be guessed.
[ -d "${TMPDIR:-/tmp}" ] || unset TMPDIR # a login node's
CACHE=$(mktemp -d "${TMPDIR:-/tmp}/cap_llm-XXXXXXXXXX") || exit 1
export TORCH_EXTENSIONS_DIR=$CACHE/extensions TRITON_CACHE_DIR=$CACHE/triton
trap 'rm -rf "$CACHE"' EXIT

# The job knows its time limit (older SLURM does not say it), and stops in time by itself.
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
  end=$(squeue -h -j "$SLURM_JOB_ID" -o %e 2>/dev/null) || true
  if [ -n "$end" ] && end=$(date -d "$end" +%s 2>/dev/null); then export SLURM_JOB_END_TIME=$end; fi
fi

export RANKS=${RANKS:-${SLURM_GPUS_ON_NODE:-1}} # ranks of a node: one for each of its GPUs
# Told their number, DeepSpeed's launcher would take the node's first GPUs and not the job's.
GPUS=(--num_gpus "$RANKS")
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
  GPUS=(--include "localhost:$(cut -d, -f"1-$RANKS" <<<"$CUDA_VISIBLE_DEVICES")")
fi
export PORT=$((20000 + SLURM_JOB_ID % 12000)) # two jobs on one node need two

# run RUN COMMAND...: does the command, which works in the run directory RUN, and passes signals on.
#
# USR1 comes to this shell when the time is nearly up (--signal=B:USR1@300). It sends USR2 to all
# processes (USR1 is NCCL's). Launchers would die of it, so they ignore it; the ranks end their step,
# write a checkpoint together, and leave their reason in RUN/ended.json, since a launcher's exit code
# does not tell it. Then the job is put back into the queue, and goes on where it stopped.
# TERM, of scancel and of a pre-emption, SLURM itself gives to all; it also requeues the pre-empted.
run() {
  local folder=$1 code job
  shift
  rm -f "$folder/ended.json"
  (trap '' USR1 USR2 && exec "$@") &
  job=$!
  trap pass_on USR1
  trap 'true' TERM
  while wait "$job"; code=$?; kill -0 "$job" 2>/dev/null; do :; done # a signal ends wait, not the job
  trap '' USR1
  if grep -qs '"goes_on": true' "$folder/ended.json"; then
    requeue
  elif [ -f "$folder/ended.json" ]; then
    grep -o '"why": "[^"]*"' "$folder/ended.json"
    code=$(grep -o '"code": [0-9]*' "$folder/ended.json" | grep -o '[0-9]*')
  fi
  return "${code:-1}"
}

pass_on() {
  trap '' USR1 USR2
  kill -USR2 0
  # Should the ranks not be done a minute before the end, SLURM still requeues instead of giving up.
  (sleep "${LAST_CALL:-240}" && requeue) &
}

requeue() {
  echo "requeue: the job goes on where it stopped"
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60 # until SLURM ends this shell
}

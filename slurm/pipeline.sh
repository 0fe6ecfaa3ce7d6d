#!/bin/bash
# shellcheck disable=SC1091
# Submits the stages of a recipe as a chain of jobs; each job starts after the one before it succeeds.
# Run it again to submit the stages that are neither done, queued nor running.
#
#   bash slurm/pipeline.sh RECIPE RUN [--option value ...]
#   bash slurm/pipeline.sh opt-6.7b-50 runs/opt-6.7b --stages "[oneshot, reconstruct, recover, evaluate]"
#
# Watch it with `squeue --me` and `cap-llm status RUN`. Set options of sbatch in the environment
# (SBATCH_PARTITION, ..., see `man sbatch`) or in the files. RECOVER=slurm/recover_multinode.sbatch
# trains on several nodes.

set -euo pipefail
recipe=${1:?usage: bash slurm/pipeline.sh RECIPE RUN [--option value ...]}
folder=${2:?usage: bash slurm/pipeline.sh RECIPE RUN [--option value ...]}
shift 2
cd "$(dirname "$0")/.."
if ! command -v deepspeed >/dev/null && [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi

# The recipe's stages and their batch files; options are checked here, before the jobs wait.
stages=$(python -c '
import sys
from cap_llm.cli.command_line import UserError, read_config
from cap_llm.pipeline import check_settings
from cap_llm.stages import STAGES
try:
    config, *_ = read_config(sys.argv[1:])
    check_settings(config)
except UserError as error:
    raise SystemExit(f"pipeline.sh: {error}") from None
print(*(f"{name}:{STAGES[name].job}" for name in config.stages))' \
  --config "$recipe" --output_dir "$folder" "$@")

states=$(python cap_llm/train.py status --json -- "$folder" 2>/dev/null) || true # a new RUN has none
# The job's comment identifies the run directory; it is quoted to fit on one line.
LC_ALL=C printf -v comment %q "$(realpath -m -- "$folder")"
before=
for entry in $stages; do
  stage=${entry%:*} file=${entry#*:}
  # A finished stage is skipped unless an earlier stage runs again. evaluate always runs, because its
  # options may have changed.
  if [[ -z $before && $stage != evaluate && $states == *"\"$stage\": \"done\""* ]]; then
    echo "$stage: done"
    continue
  fi
  job=$(squeue -h --me -o "%A %j %k" | job="cap-$stage $comment" awk '{id = $1; sub(/^[^ ]* /, "")}
    $0 == ENVIRON["job"] {found = id} END {print found}')
  if [ -n "$job" ]; then
    echo "$stage: job $job is already in the queue"
  else
    if [ "$file" = recover ]; then file=${RECOVER:-slurm/recover.sbatch}; else file=slurm/$file.sbatch; fi
    job=$(STAGE=$stage sbatch --parsable --job-name="cap-$stage" --comment="$comment" \
      ${before:+--dependency=afterok:$before --kill-on-invalid-dep=yes} "$file" "$recipe" "$folder" "$@")
    echo "$stage: job $job"
  fi
  before=${job%%;*} # federated clusters append the cluster's name
done

#!/bin/bash
# shellcheck disable=SC1091
# Submits the stages of one recipe as a chain of jobs, each of which starts when the one before it has
# ended well. Called again, it passes over what is done, queued or running, and submits the rest.
#
#   bash slurm/pipeline.sh RECIPE RUN [--option value ...]
#   bash slurm/pipeline.sh opt-6.7b-50 runs/opt-6.7b --stages "[oneshot, reconstruct, recover, evaluate]"
#
# Watch it with `squeue --me` and `cap-llm status RUN`. Options for sbatch: SBATCH_PARTITION and so on
# (`man sbatch`), or edit the files. RECOVER=slurm/recover_multinode.sbatch trains on several nodes.

set -euo pipefail
recipe=${1:?usage: bash slurm/pipeline.sh RECIPE RUN [--option value ...]}
folder=${2:?usage: bash slurm/pipeline.sh RECIPE RUN [--option value ...]}
shift 2
cd "$(dirname "$0")/.."
if ! command -v deepspeed >/dev/null && [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi

# The recipe's stages, with the options read and checked here instead of after a night in the queue.
stages=$(python -c '
import sys
from cap_llm.cli.command_line import UserError, read_config
from cap_llm.models.hub import refuse_another_run
try:
    config, *_ = read_config(sys.argv[1:])
    config.check()
    refuse_another_run(config)
except UserError as error:
    raise SystemExit(f"pipeline.sh: {error}") from None
print(*config.stages)' --config "$recipe" --output_dir "$folder" "$@")

states=$(python cap_llm/train.py status --json -- "$folder" 2>/dev/null) || true # of a new RUN: none
# The run directory is the job's comment: so a job of ours is known again. One line, whatever it holds.
LC_ALL=C printf -v place %q "$(realpath -m -- "$folder")"
before=
for stage in $stages; do
  # What is done stays done only as long as no stage before it is made anew; the scores that are asked
  # for may be others than an earlier job's.
  if [[ -z $before && $stage != evaluate && $states == *"\"$stage\": \"done\""* ]]; then
    echo "$stage: done"
    continue
  fi
  job=$(squeue -h --me -o "%A %j %k" | job="cap-$stage $place" awk '{id = $1; sub(/^[^ ]* /, "")}
    $0 == ENVIRON["job"] {found = id} END {print found}')
  if [ -n "$job" ]; then
    echo "$stage: job $job is in the queue already"
  else
    case $stage in
      recover) file=${RECOVER:-slurm/recover.sbatch} ;;
      evaluate) file=slurm/evaluate.sbatch ;;
      *) file=slurm/oneshot.sbatch ;;
    esac
    job=$(STAGE=$stage sbatch --parsable --job-name="cap-$stage" --comment="$place" \
      ${before:+--dependency=afterok:$before --kill-on-invalid-dep=yes} "$file" "$recipe" "$folder" "$@")
    echo "$stage: job $job"
  fi
  before=${job%%;*} # where clusters are joined, the cluster's name follows
done

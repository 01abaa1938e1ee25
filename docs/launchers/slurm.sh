#!/bin/bash
# 64 workers that come and go: sbatch docs/launchers/slurm.sh R.toml; once more to add 64. No node waits for another.
#SBATCH --job-name=label --array=0-63 --ntasks=1 --cpus-per-task=16 --gpus-per-task=1 --time=08:00:00
#SBATCH --requeue --signal=TERM@60 --open-mode=append --output=label-%A_%a.log
# A preempted task is queued again (--requeue). TERM, a minute before the end, gives the part back at once.
exec srun distill label "${1:?a recipe}" --worker

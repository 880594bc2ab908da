#!/bin/sh
# sbatch docs/scale/slurm.sh MODEL OUT [options of quantize]: NF4 of a model by eight tasks, wherever they run.
# OUT lies on a filesystem that all nodes see. A task that dies is started again: scontrol requeue JOB_TASK.
# When all are done: sbatch --dependency=afterok:JOB --wrap "quantkit finish OUT"
#SBATCH --job-name=quantkit
#SBATCH --array=1-8
#SBATCH --cpus-per-task=4
#SBATCH --mem=2G
#SBATCH --requeue
set -eu
model=$1 out=$2
shift 2
exec quantkit quantize "$model" -o "$out" --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" --quiet "$@"

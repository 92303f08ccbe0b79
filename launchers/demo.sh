#!/usr/bin/env bash
# The whole road on the demo shop, on 2 CPU ranks: data, shards, pretraining, fine-tuning, evaluation, report.
# Every line is a command that you would use on your own data. Run it as `make demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
command -v nvidia-smi > /dev/null || export DS_ACCELERATOR=cpu  # else deepspeed warns that it found nothing better
runs=runs/demo
say() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

rm -rf "$runs"
say "1/6 raw files of a small shop"
python -m etl synth --out raw/demo
say "2/6 raw files -> shards"
python -m etl build demo --raw raw/demo --lake lake
python -m etl verify lake/gold/demo
say "3/6 pretraining, ZeRO-2 on 2 ranks"
deepspeed -q --num_accelerators 2 launchers/pretrain.py --deepspeed ds_configs/zero2.json --run $runs/pretrain
say "4/6 fine-tuning from it, all parts trained"
deepspeed -q --num_accelerators 2 launchers/finetune.py --deepspeed ds_configs/zero2.json \
  --from $runs/pretrain --data lake/gold/demo --labels all --run $runs/finetuned
say "5/6 the same model from scratch"
deepspeed -q --num_accelerators 2 launchers/finetune.py --deepspeed ds_configs/zero2.json \
  --from none --data lake/gold/demo --labels all --run $runs/scratch
say "6/6 evaluation and report"
for run in finetuned scratch; do
  python launchers/evaluate.py --run $runs/$run --data lake/gold/demo --split test
done
python -m lanistr report --pretrain $runs/pretrain --finetuned $runs/finetuned $runs/scratch \
  --truth raw/demo/truth.json --out $runs/report.md
say "done"

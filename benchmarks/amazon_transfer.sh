#!/usr/bin/env bash
# Office -> Fashion and Beauty on Amazon Review Data (2018): every command behind compare_fashion and compare_beauty.
# usage: benchmarks/amazon_transfer.sh RAW TOKENIZER.json MINILM_FOLDER
# RAW holds Office_Products_5_balanced9000.csv.gz, AMAZON_FASHION_5.json.gz and All_Beauty_5.json.gz.
# Splits are by reviewer: about 5 % of train's reviewers choose among models, more than half are tested on. The reviewer's
# name is no column: no reviewer of the test split is in train.
set -euo pipefail
raw=$1 tokenizer=$(realpath "$2") encoder=$3
build() {
  python -m etl build "$1" --raw "$raw" --lake lake source.metadata=null source.images=null image=null \
    "text.tokenizer={path: $tokenizer}" "tabular.categorical=[product, verified, year]" "${@:2}"
}
build amazon_office source.reviews=Office_Products_5_balanced9000.csv.gz "split={train: 0.95, val: 0.05, test: 0}"
build amazon_fashion "split={train: 0.4, val: 0.05, test: 0.55}"
build amazon_beauty "split={train: 0.4, val: 0.04, test: 0.56}"
text="model.modalities.text.pretrained=$encoder"
python launchers/pretrain.py --deepspeed ds_configs/zero2.json --recipe amazon_minilm --data lake/gold/amazon_office \
  --run runs/office "$text" pretrain.eval_every=null pretrain.health_every=null
for name in fashion beauty; do
  python -m lanistr compare amazon_minilm --data lake/gold/amazon_$name --from runs/office --labels 512 --seeds 5 \
    --metric accuracy,macro_f1 --out runs/compare_$name "$text"
done

#!/usr/bin/env bash
# Office -> Fashion and Beauty on Amazon Review Data (2018): every command behind compare_fashion and compare_beauty
# (with amazon_minilm_mlm: compare_fashion_mlm and compare_beauty_mlm).
# usage: benchmarks/amazon_transfer.sh RAW TOKENIZER.json MINILM_FOLDER [amazon_minilm_mlm]
# RAW holds Office_Products_5_balanced9000.csv.gz, AMAZON_FASHION_5.json.gz and All_Beauty_5.json.gz.
# Splits are by reviewer: about 5 % of train's reviewers choose among models, more than half are tested on. The reviewer's
# name is no column: no reviewer of the test split is in train.
set -euo pipefail
raw=$1 tokenizer=$(realpath "$2") encoder=$3 recipe=${4:-amazon_minilm}
build() {
  python -m etl build "$1" --raw "$raw" --lake lake source.metadata=null source.images=null image=null \
    "text.tokenizer={path: $tokenizer}" "tabular.categorical=[product, verified, year]" "${@:2}"
}
build amazon_office source.reviews=Office_Products_5_balanced9000.csv.gz "split={train: 0.95, val: 0.05, test: 0}"
build amazon_fashion "split={train: 0.4, val: 0.05, test: 0.55}"
build amazon_beauty "split={train: 0.4, val: 0.04, test: 0.56}"
text="model.modalities.text.pretrained=$encoder"
compare() {  # NAME RECIPE further arguments
  python -m lanistr compare "$2" --data "lake/gold/amazon_$1" --pretrain-data lake/gold/amazon_office --seeds 5 \
    --labels 512 --metric accuracy,macro_f1 "${@:3}" "$text"
}
methods=majority,tfidf,trees,probe,lanistr_scratch,lanistr
more=latefusion,medfuse_all,tab2txt,frozen_scratch,frozen  # ALBEF needs images, which the files lack
if [ "$recipe" = amazon_minilm_mlm ]; then
  for name in fashion beauty; do
    compare $name $recipe --methods $methods --out runs/compare_${name}_mlm
  done
  exit
fi
for name in fashion beauty; do
  mkdir -p runs/compare_$name
  if [ $name = beauty ]; then  # the same pretraining serves both
    for seed in 0 1 2; do ln -sfn ../compare_fashion/pretrain-$seed runs/compare_beauty/pretrain-$seed; done
    mkdir -p runs/compare_beauty/runs && ln -sfn ../../compare_fashion/runs/tab2txt runs/compare_beauty/runs/tab2txt
  fi
  compare $name $recipe --pretrain-seeds 3 --methods $methods,$more --out runs/compare_$name pretrain.cache=runs/features_office
done

"""Useful operations: the same counter as `describe`, without padding."""

import torch

from lanistr.config import load_recipe
from lanistr.data.loader import Collator
from lanistr.data.reader import Sample
from lanistr.describe import count_work
from lanistr.manifest import ModalitySchema
from lanistr.modalities import MODALITIES
from lanistr.training.flops import measured_peak, meta_pretrain, useful_flops
from lanistr.transforms import MEMBERS
from tests.model.support import NAMES, RECIPE, SCHEMAS, make_batch, make_modalities, random_samples


def test_a_complete_sample_costs_three_times_what_describe_says() -> None:
    recipe = load_recipe("demo", ["objective.decorrelation=0"])  # which describe does not list
    schemas = {name: MODALITIES[name].paper_schema() for name in recipe.model.modalities}
    task, modalities = meta_pretrain(recipe, schemas)
    contents = {name: modality.example() for name, modality in modalities.items()}
    batch = Collator(modalities, views=2, seed=0)(
        [Sample(key="example", presence=0, label=-1, contents=contents)], [1.0], 0
    )
    described = sum(work.flops for work in count_work(recipe).values())
    assert useful_flops(task, batch) == 3 * described


def test_padding_does_not_count_and_a_batch_is_the_sum_of_its_samples() -> None:
    schemas = {n: ModalitySchema(kind=n, members=MEMBERS[n], spec=spec.model_dump()) for n, spec in SCHEMAS.items()}
    task, _ = meta_pretrain(RECIPE, schemas)
    modalities = make_modalities()
    contents, masks = random_samples(modalities, [NAMES] * 9, seed=1)
    batch = make_batch(modalities, contents, masks)
    alone = [useful_flops(task, make_batch(modalities, [c], [m])) for c, m in zip(contents, masks, strict=True)]
    assert useful_flops(task, batch) == sum(alone)
    assert len(set(alone)) > 1, "lengths differ"


def test_peak_is_a_positive_rate() -> None:
    assert measured_peak(torch.device("cpu"), torch.float32, size=64) > 1e6

"""The plan of a build: what joins its two halves, and what lets any process on any machine go on with it.

It lies with its silver in a hidden folder of the lake until the build is finished.
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from etl.encoder import Encoder
from etl.lake import whole_file, work_folder
from etl.recipe import Recipe
from etl.silver import Task
from etl.tasks import Job
from lanistr.manifest import ModalitySchema, Strict, Target, Tokenizer
from lanistr.transforms import SPECS

PLAN = "plan.json"
BUCKETS = "buckets.json"


class Plan(Strict):
    """All that the tasks and the manifest need to know.

    Attributes:
        identity: hash over recipe, raw files, kept fit, code and versions.
        records: raw records read, good and bad.
        fingerprint: see `etl.tasks.Job`.
    """

    identity: str
    recipe: dict[str, Any]
    modalities: dict[str, ModalitySchema]
    tokenizer: Tokenizer | None
    labels: list[str]
    target: Target = "class"
    numeric: list[str]
    categorical: list[str]
    split_rule: dict[str, Any]
    fit: dict[str, str]
    counts: dict[str, int]
    quarantine: dict[str, int]
    records: int
    parents: list[dict[str, str]]
    created_by: dict[str, str]
    fingerprint: str
    tasks: list[Task]

    def job(self, raw: Path, lake: Path) -> Job:
        """What the tasks have in common."""
        recipe = Recipe.model_validate(self.recipe)
        gold = (lake / "gold" / recipe.name).resolve()
        return Job(
            name=recipe.name,
            silver=work_folder(lake, recipe.name).resolve() / "silver",
            gold=gold,
            encoder=Encoder(
                specs={name: SPECS[s.kind].model_validate(s.spec) for name, s in self.modalities.items()},
                raw=raw.resolve(),
                tokenizer=gold / self.tokenizer.file if self.tokenizer else None,
                max_chars=recipe.text.max_chars if recipe.text else None,
                keep_raw=bool(recipe.text and recipe.text.keep_raw),
            ),
            schemas=self.modalities,
            labels=tuple(self.labels),
            target=self.target,
            numeric=tuple(self.numeric),
            categorical=tuple(self.categorical),
            require=tuple(recipe.require),
            shard_size=recipe.shard_size,
            fingerprint=self.fingerprint,
        )

    def save(self, work: Path) -> None:
        """Write the plan, whole or not at all."""
        with whole_file(work / PLAN) as temporary:
            temporary.write_text(self.model_dump_json(indent=1), encoding="utf-8")

    def is_whole(self, lake: Path) -> bool:
        """Whether all is there that the plan names: a build may have been killed while it moved folders into place."""
        name = self.recipe["name"]
        work = work_folder(lake, name)
        files = [work / "silver" / file for task in self.tasks for file in (task.rows, task.series) if file]
        files += [work / "bronze" / "_files.parquet", work / "fit" / BUCKETS]
        files += [lake / "gold" / name / self.tokenizer.file] if self.tokenizer else []
        return all(file.is_file() for file in files)


def load_plan(work: Path) -> Plan | None:
    """The plan in a work folder, if there is one that this version can read."""
    try:
        return Plan.model_validate_json((work / PLAN).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None

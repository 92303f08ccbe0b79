"""Bronze, silver, gold: one build of one recipe.

`prepare` ingests, fits and cuts silver into tasks; the tasks write shards, here or on a cluster; `finish` writes the
manifest, last: a build that fails or is killed leaves the earlier dataset as it was, and a rerun goes on where it stopped.
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from etl.cluster import Executor, InProcess
from etl.lake import ROOMS, leftovers, lock, publish, say, whole_file, work_folder
from etl.plan import Plan, load_plan
from etl.prepare import NO_LIMITS, Limits, prepare, stop_if_dirty
from etl.progress import Progress
from etl.recipe import Recipe
from etl.silver import Task
from etl.tasks import Report, run_task
from lanistr.manifest import SPLITS, Manifest


def build(
    recipe: Recipe,
    raw: Path,
    lake: Path,
    *,
    refit: bool = False,
    max_bad: float = 1.0,
    limits: Limits = NO_LIMITS,
    executor: Executor | None = None,
) -> Path:
    """Build a gold dataset; returns its folder, ``lake/gold/<name>``.

    Args:
        recipe: what to build.
        raw: folder with the raw files, only read.
        lake: folder of bronze, silver, gold, quarantine, fit.
        refit: fit anew although an earlier build left a fit.
        max_bad: stop where more than this share of the raw records was set aside.
        limits: memory, threads and temporary folder of the ingest.
        executor: where the tasks run; this process where absent. The bytes do not depend on it.

    Raises:
        ValueError: anything that a user can put right. Where too much was set aside, ``lake/quarantine/<name>`` is
            written nevertheless: it says what.
    """
    with lock(lake, recipe.name):
        for file in leftovers(lake / "gold" / recipe.name):
            file.unlink()
        plan = prepare(recipe, raw, lake, refit=refit, max_bad=max_bad, limits=limits)
        reports = _run(plan, plan.tasks, raw, lake, executor or InProcess())
        return _finish(plan, reports, lake, max_bad)


def build_plan(
    recipe: Recipe, raw: Path, lake: Path, *, refit: bool = False, max_bad: float = 1.0, limits: Limits = NO_LIMITS
) -> None:
    """Ingest, fit and plan the tasks, anew in any case: the first step of an array job. Raises as `build`."""
    with lock(lake, recipe.name):
        prepare(recipe, raw, lake, refit=refit, max_bad=max_bad, limits=limits, again=True)


def build_share(
    recipe: Recipe, raw: Path, lake: Path, index: int, count: int, *, executor: Executor | None = None
) -> None:
    """Run the tasks of member ``index`` of an array job of ``count`` members, after `prepare`.

    Members may run at the same time, in any order and more than once. `build` then runs what they left and finishes.

    Raises:
        ValueError: no plan, the plan of another recipe, or an index out of range.
    """
    if not 0 <= index < count:
        raise ValueError(f"--task-index {index}: must be from 0 to {count - 1} for --num-tasks {count}")
    with lock(lake, recipe.name, shared=True):
        plan = load_plan(work_folder(lake, recipe.name))
        if plan is None:
            raise ValueError(f"{lake}: no plan for {recipe.name}; run the command with --prepare first, once")
        if plan.recipe != recipe.model_dump(mode="json"):
            raise ValueError(f"{lake}: {recipe.name} was prepared from another recipe; run with --prepare again")
        _run(plan, plan.tasks[index::count], raw, lake, executor or InProcess())


def _run(plan: Plan, tasks: Sequence[Task], raw: Path, lake: Path, executor: Executor) -> list[Report]:
    progress = Progress("gold", sum(task.n for task in tasks), len(tasks))
    reports = []
    for report in executor.map(partial(run_task, plan.job(raw, lake)), tasks):
        progress.add(report.n, report.reused)
        reports.append(report)
    return sorted(reports, key=lambda report: (SPLITS.index(report.split), report.bucket))


def _finish(plan: Plan, reports: Sequence[Report], lake: Path, max_bad: float) -> Path:
    name = plan.recipe["name"]
    work, gold = work_folder(lake, name), lake / "gold" / name
    reasons = Counter(plan.quarantine) + Counter(image.reason for r in reports for image in r.broken_images)
    quarantine = dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
    _write_broken_images(reports, work / "quarantine")
    stop_if_dirty(quarantine, plan.records, max_bad, work, lake / "quarantine" / name)
    manifest = Manifest(
        name=name,
        modalities=plan.modalities,
        tokenizer=plan.tokenizer,
        labels=plan.labels,
        target=plan.target,
        split_rule=plan.split_rule,
        fit=plan.fit,
        private=Recipe.model_validate(plan.recipe).is_private,
        shards=[shard for report in reports for shard in report.shards],
        quarantine=quarantine,
        counts=plan.counts,
        parents=plan.parents,
        created_by=plan.created_by,
    )
    manifest.content_id = manifest.compute_content_id()
    for split in SPLITS:
        say(f"gold: {split}: {manifest.n(split):,} samples in {len(manifest.shards_of(split)):,} shards")
    for reason, count in quarantine.items():
        say(f"quarantine: {reason}: {count:,}")
    say(f"quarantine: {sum(quarantine.values()):,} records in all")
    for room in ROOMS[:-1]:
        publish(work / room, lake / room / name)
    manifest.save(gold)
    shutil.rmtree(work)
    return gold


def _write_broken_images(reports: Iterable[Report], folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"file": image.file, "line": 0, "reason": image.reason, "raw": image.key}
        for report in reports
        for image in report.broken_images
    ]
    if rows:
        folder.mkdir(exist_ok=True)
        with whole_file(folder / "images.parquet") as temporary:
            pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")

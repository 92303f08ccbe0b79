"""Remove from a lake what no manifest refers to: shards of earlier builds, and what killed builds left."""

import shutil
from pathlib import Path

from etl.lake import ROOMS, leftovers, lock, work_folder
from etl.tasks import REPORTS, read_report
from lanistr.manifest import MANIFEST_NAME, SPLITS, Manifest


def collect(lake: Path, *, dry_run: bool = False) -> list[str]:
    """Remove stale files; returns a line per dataset and what was found.

    Only what a build writes is ever removed: other files are left where they are. A dataset that is being built is
    passed over. What an unfinished first build has done is removed too: it has no manifest yet.

    Args:
        lake: folder of a lake.
        dry_run: only say what would be removed.

    Raises:
        ValueError: not a lake.
    """
    names = sorted(_names(lake))
    if not names:
        raise ValueError(f"{lake}: not a lake; it has none of the folders {', '.join(ROOMS)}")
    lines, total = [], 0
    for name in names:
        try:
            with lock(lake, name):
                stale = _stale(lake, name)
                size = sum(map(_size, stale))
                for path in [] if dry_run else stale:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        except ValueError:
            lines.append(f"{name}: is being built; passed over")
            continue
        total += size
        lines += [f"  {path.relative_to(lake)}" for path in stale]
        lines.append(f"{name}: {len(stale):,} stale files and folders, {size / 2**20:,.1f} MiB")
    done = "would be removed" if dry_run else "removed"
    return [*lines, f"{total / 2**20:,.1f} MiB {done}"]


def _names(lake: Path) -> set[str]:
    """Datasets that have a folder in a room, or the work folder of a killed build."""
    found = {path.name for room in ROOMS if (lake / room).is_dir() for path in (lake / room).iterdir() if path.is_dir()}
    names = {name.removeprefix(".").removesuffix(".old") for name in found}
    hidden = {path.name for path in lake.glob(".*.building")} if lake.is_dir() else set()
    return names | {name.removeprefix(".").removesuffix(".building") for name in hidden}


def _stale(lake: Path, name: str) -> list[Path]:
    """What may be removed, in order."""
    asides = [lake / room / f".{name}.old" for room in ROOMS]
    found = [path for path in (work_folder(lake, name), *asides) if path.exists()]
    gold = lake / "gold" / name
    live = _live(gold)
    made = [path for split in SPLITS for kind in ("tar", "parquet") for path in (gold / split).glob(f"[!.]*.{kind}")]
    made += [*gold.glob("tokenizer-*.json"), *(gold / REPORTS).glob("[!.]*.json")]
    found += [path for path in made if str(path.relative_to(gold)) not in live]
    return sorted({*found, *leftovers(gold)})


def _live(gold: Path) -> set[str]:
    """Files that the manifest names, and the reports of the tasks that wrote its shards."""
    if not (gold / MANIFEST_NAME).is_file():
        return set()
    manifest = Manifest.load(gold)
    live = {file for shard in manifest.shards for file in (shard.path, shard.index)}
    live |= {manifest.tokenizer.file} if manifest.tokenizer else set()
    for path in (gold / REPORTS).glob("*.json"):
        report = read_report(path)
        if report and report.shards and all(shard.path in live for shard in report.shards):
            live.add(str(path.relative_to(gold)))
    return live


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())

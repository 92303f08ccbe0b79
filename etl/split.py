"""Group-safe splits: a group's hash decides, so that no group ever lies in two splits."""

import hashlib

from etl.quarantine import literal
from etl.recipe import Split

BUCKETS = 10_000


def bounds(split: Split) -> tuple[int, int]:
    """Buckets below the first bound are train, below the second val, the others test."""
    train = round(BUCKETS * split.train)
    return train, train + round(BUCKETS * split.val)


def split_of(group: str, split: Split) -> str:
    """The split of one group; `split_sql` says the same in SQL."""
    digest = hashlib.md5(f"{split.salt}:{group}".encode()).digest()
    bucket = int.from_bytes(digest, "little") % BUCKETS
    train, val = bounds(split)
    return "train" if bucket < train else "val" if bucket < val else "test"


def split_sql(expression: str, split: Split) -> str:
    """DuckDB expression for the split of the group in ``expression`` (a varchar, never null)."""
    train, val = bounds(split)
    bucket = f"md5_number({literal(split.salt + ':')} || {expression}) % {BUCKETS}"
    return f"case when {bucket} < {train} then 'train' when {bucket} < {val} then 'val' else 'test' end"


def rule(split: Split, group: str) -> dict[str, object]:
    """The split rule as the manifest states it."""
    return {
        "method": f"md5_number(salt || ':' || group) % {BUCKETS}",
        "group": group,
        "salt": split.salt,
        "bounds": list(bounds(split)),
    }

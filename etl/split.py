"""Group-safe splits. A split is a pure function of the samples and a rule that the manifest states.

* ``hash`` (default): the group's hash decides. Stable for good: no new group ever moves another.
* ``stratified``: the same hash orders the groups within each label (a group's most frequent one; unlabelled groups are
  a stratum of their own), and shares are cut exactly. Stable for the same data; a new group moves at most one other
  group of its stratum over each bound.
* ``time``: a group goes by its latest sample: train ends before ``val``, val before ``test``. Nothing in train is from
  the future of what is evaluated on. A group without any time is in no split.

With ``unlabelled: train`` a group without any label is train, whatever the first two rules say; they are asked about the
other groups as before, which stay where they are.

A group is what the source says, merged over near-duplicate texts where the recipe asks for it (`etl.near`).
"""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from etl.quarantine import literal
from etl.recipe import Split

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

BUCKETS = 10_000
MERGED = "merged"  # column of ``samples``: the group, merged over near duplicates


def bounds(split: Split) -> tuple[int, int]:
    """Buckets below the first bound are train, below the second val, the others test."""
    train = round(BUCKETS * split.train)
    return train, train + round(BUCKETS * split.val)


def rule(split: Split, group: str) -> dict[str, Any]:
    """The split rule as the manifest states it."""
    made: dict[str, Any] = {"method": split.method, "group": group, "salt": split.salt}
    if split.time:
        made |= {"time": [split.time.val, split.time.test]}
    else:
        made |= {"hash": f"md5_number(salt || ':' || group) % {BUCKETS}", "bounds": list(bounds(split))}
    if split.unlabelled == "train":
        made |= {"unlabelled": "train"}
    if split.near_duplicates:
        made |= {"near_duplicates": split.near_duplicates}
    return made


def split_of(group: str, split: Split) -> str:
    """The split of one group by its hash; `select` says the same in SQL."""
    digest = hashlib.md5(f"{split.salt}:{group}".encode()).digest()
    bucket = int.from_bytes(digest, "little") % BUCKETS
    train, val = bounds(split)
    return "train" if bucket < train else "val" if bucket < val else "test"


def select(rule: Mapping[str, Any], samples: str) -> str:
    """SQL for (row_id, split), split null = in none, of a table with row_id, grp, label, and time or merged if needed.

    Args:
        rule: from `rule`, or from a manifest.
        samples: SQL name of the table.
    """
    group = _group(rule)
    if rule["method"] == "time":
        val, test = rule["time"]
        latest = f"max(time) over (partition by {group})"
        return f"select row_id, {_cases(latest, val, test)} as split from {samples}"
    if rule["method"] == "hash":
        return f"select row_id, {_unless_unlabelled(rule, _by_hash(rule))} as split from {samples}"
    train, val = rule["bounds"]
    return f"""with counted as (select {group} as g, label, count(*) as n from {samples} group by all),
        strata as (select g, label, {_hash(rule, "g")} as hashed from counted
            qualify row_number() over (partition by g order by n desc, label nulls last) = 1),
        placed as (select g, {BUCKETS} * (row_number() over (partition by label order by hashed, g) - 0.5)
            / count(*) over (partition by label) as place from strata)
        select row_id, {_unless_unlabelled(rule, _cases("place", train, val))} as split from {samples} join placed on g = {group}"""


def _group(rule: Mapping[str, Any]) -> str:
    return MERGED if "near_duplicates" in rule else "grp"


def _by_hash(rule: Mapping[str, Any]) -> str:
    return _cases(digest_modulo(f"{literal(rule['salt'] + ':')} || {_group(rule)}", BUCKETS), *rule["bounds"])


def _unless_unlabelled(rule: Mapping[str, Any], value: str) -> str:
    """Train for a group without any label where the rule says so; else what ``value`` says."""
    if "unlabelled" not in rule:
        return value
    return f"case when max(label) over (partition by {_group(rule)}) is null then 'train' else {value} end"


def digest_modulo(text: str, n: int) -> str:
    """SQL for ``md5_number(text) % n``, in 64-bit halves: DuckDB divides 128-bit numbers twenty times as slowly."""
    digest = f"md5_number({text})"
    high, low = f"({digest} >> 64)::ubigint", f"({digest} & {2**64 - 1}::uhugeint)::ubigint"
    return f"(({high} % {n}::ubigint) * {2**64 % n}::ubigint + {low} % {n}::ubigint) % {n}::ubigint"


def _hash(rule: Mapping[str, Any], group: str) -> str:
    return f"md5_number({literal(rule['salt'] + ':')} || {group})"


def _cases(value: str, val: float, test: float) -> str:
    return f"case when {value} < {val} then 'train' when {value} < {test} then 'val' when {value} >= {test} then 'test' end"


def assign(con: "DuckDBPyConnection", split: Split, group: str) -> dict[str, int]:
    """Give every row of ``samples`` its ``split``; returns what was merged or left out, for the counts.

    A hash alone needs one row to tell its split: ``samples`` becomes a view, and no table is written or updated.

    Raises:
        ValueError: a time split of a source without times, or a merged group that is too large.
    """
    counts: dict[str, int] = {}
    if split.near_duplicates:
        from etl.near import merge_groups

        counts = merge_groups(con, split.near_duplicates)
    names = [row[0] for row in con.execute("describe samples").fetchall()]
    if split.time and "time" not in names:
        raise ValueError("split.time: the source gives no time; name a column in source.time")
    made = rule(split, group)
    con.execute("alter table samples rename to whole")
    if split.method == "hash" and "unlabelled" not in made:
        con.execute(f"create view samples as select *, {_by_hash(made)} as split from whole")
        return counts
    con.execute(
        f"create table samples as select whole.*, split from whole join ({select(made, 'whole')}) using (row_id) "
        "where split is not null"
    )
    if split.time:
        left = con.execute("select (select count(*) from whole) - (select count(*) from samples)").fetchall()[0][0]
        counts["without a time, in no split"] = left
    con.execute("drop table whole")
    return counts

"""Near-duplicate texts: groups whose texts are nearly the same become one group, so that they share a split.

MinHash over word 3-grams (Broder 1997), by the library datasketch, whose hashes depend on nothing but the text.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from etl.split import MERGED

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

MIN_WORDS = 20  # shorter texts recur by chance
SHINGLE = 3
PERMUTATIONS = 128
LARGEST = 0.01  # of all samples
FEW = 10  # a merged group of so many samples is never too large
WORD = re.compile(r"\w+")


def merge_groups(con: "DuckDBPyConnection", threshold: float) -> dict[str, int]:
    """Add the column ``merged`` to ``samples``: the least name among the groups that it is near to.

    Args:
        con: has ``samples`` with row_id, grp, text.
        threshold: Jaccard similarity of the 3-grams, 0 to 1.

    Returns:
        For the counts: groups that were merged into others.

    Raises:
        ValueError: a merged group holds more than 1 % of the samples.
    """
    rows = con.execute("select grp, text from samples where text is not null order by row_id").fetchall()
    name_of = merged_names(rows, threshold)
    con.execute("create temp table near (g varchar, name varchar)")
    if name_of:
        con.executemany("insert into near values (?, ?)", [list(pair) for pair in sorted(name_of.items())])
    con.execute(f"alter table samples add column {MERGED} varchar")
    con.execute(f"update samples set {MERGED} = grp")
    con.execute(f"update samples set {MERGED} = near.name from near where near.g = samples.grp")
    con.execute("drop table near")
    _check_sizes(con)
    return {"groups merged over near-duplicate texts": sum(group != name for group, name in name_of.items())}


def _check_sizes(con: "DuckDBPyConnection") -> None:
    total = con.execute("select count(*) from samples").fetchall()[0][0]
    largest = con.execute(
        f"select count(*), count(distinct grp) from samples group by {MERGED} having count(distinct grp) > 1 "
        "order by all desc limit 1"
    ).fetchall()
    if largest and largest[0][0] > max(FEW, LARGEST * total):
        n, groups = largest[0]
        raise ValueError(
            f"split.near_duplicates merges {groups:,} groups into one of {n:,} samples, more than {LARGEST:.0%} of the "
            f"{total:,}: boiler-plate text, or too low a threshold; raise it, shorten the text, or leave it out"
        )


def merged_names(rows: Iterable[tuple[str, str]], threshold: float) -> dict[str, str]:
    """Group -> name of its merged group, for every group that is near to another.

    Args:
        rows: (group, text).
        threshold: of the Jaccard similarity, as MinHash estimates it.
    """
    import numpy as np
    from datasketch import MinHash, MinHashLSH
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    hashes: dict[object, tuple[str, MinHash]] = {}
    pairs: set[tuple[str, str]] = set()
    for group, text in rows:
        shingles = _shingles(text)
        if not shingles:
            continue
        made = MinHash(num_perm=PERMUTATIONS, seed=1)
        made.update_batch(shingles)
        for other in index.query(made):
            neighbour, theirs = hashes[other]
            if neighbour != group and made.jaccard(theirs) >= threshold:
                pairs.add((group, neighbour))
        index.insert(len(hashes), made)
        hashes[len(hashes)] = group, made
    names = sorted({group for pair in pairs for group in pair})
    if not names:
        return {}
    at = {name: i for i, name in enumerate(names)}
    a, b = np.array([(at[x], at[y]) for x, y in sorted(pairs)]).T
    _, component = connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(len(names), len(names))))
    first: dict[int, str] = {}
    return {name: first.setdefault(int(c), name) for name, c in zip(names, component, strict=True)}


def _shingles(text: str) -> list[bytes]:
    """Distinct 3-grams of words; none for a text of fewer than 20 words."""
    words = WORD.findall(text.lower())
    if len(words) < MIN_WORDS:
        return []
    return sorted({" ".join(words[i : i + SHINGLE]).encode() for i in range(len(words) - SHINGLE + 1)})

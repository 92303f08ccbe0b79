"""Hold a gold dataset against the lake it was built in: silver (rows, splits, times, tokenizer) and quarantine."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from etl import split, wordpiece
from etl.quarantine import column, literal
from lanistr.manifest import Manifest
from lanistr.transforms import FIRST_KNOWN_ID, MISSING_ID, UNSEEN_ID, TabularSpec, load_tokenizer

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

LOOK_INTO = 20_000  # rows whose values are compared
RETRAIN = 50_000  # texts; above, training the tokenizer again would take minutes


def verify_lake(gold: Path, manifest: Manifest, index: pl.DataFrame) -> list[str]:
    """Lines that say what was compared.

    Raises:
        ValueError: gold and the lake disagree, or a feature is later than the label.
    """
    import duckdb

    lake = gold.resolve().parents[1]
    files = sorted((lake / "silver" / gold.name).glob("samples/*.parquet"))
    if not files:
        return ["lake: not around this dataset; silver, times and quarantine are not compared"]
    with duckdb.connect() as con:
        con.execute(f"create view samples as from read_parquet([{', '.join(map(literal, files))}])")
        return [
            _rows(con, manifest, index),
            *_values(con, manifest, index),
            _split_rule(con, manifest),
            *_times(con, manifest, index),
            *_quarantine(manifest, lake / "quarantine" / gold.name),
            *_tokenizer(con, gold, manifest),
        ]


def _key(manifest: Manifest) -> str:
    """SQL for `lanistr.manifest.sample_key`, made again from the raw identifiers."""
    return f"left(sha256({literal(manifest.name + '|')} || grp || '|' || row_id), 16)"


def _rows(con: "DuckDBPyConnection", manifest: Manifest, index: pl.DataFrame) -> str:
    """Every sample of gold is a row of silver, in the same split and group, with the same label."""
    group = f"left(sha256({literal(manifest.name + '|')} || grp), 16)"
    rows = con.sql(f"select {_key(manifest)} as key, {group} as group_hash, split, label from samples").pl()
    names = manifest.labels if manifest.target == "class" else ["known"]
    labels = pl.DataFrame({"label": [*range(len(names)), -1], "name": [*names, None]})
    if manifest.target != "class":
        rows = rows.with_columns(pl.when(pl.col("label").is_not_null()).then(pl.lit("known")).alias("label"))
    ours = index.select("key", "group_hash", "split", pl.col("label").cast(pl.Int64))
    ours = ours.join(labels.cast({"label": pl.Int64, "name": pl.String}), on="label")
    both = ours.join(rows, on="key", suffix="_silver")
    if both.height < index.height:
        raise ValueError(
            f"lake: {index.height - both.height:,} samples of gold are no rows of silver: another build has been there"
        )
    for name, other in (("group_hash", "group_hash_silver"), ("split", "split_silver"), ("name", "label_silver")):
        wrong = both.filter(pl.col(name).ne_missing(pl.col(other)))
        if wrong.height:
            what = "label" if name == "name" else name
            raise ValueError(f"lake: {wrong.height:,} samples have another {what} in silver, e.g. {wrong['key'].min()}")
    left = rows.height - index.height
    dropped = f"; {left:,} further rows lack a required modality" if left else ""
    return f"lake: {index.height:,} samples are rows of silver, with the same split, group and label{dropped}"


def _values(con: "DuckDBPyConnection", manifest: Manifest, index: pl.DataFrame) -> list[str]:
    """The stored rows say what silver says: the same numbers as float32, the names of the category ids."""
    lines = []
    for name, schema in manifest.modalities.items():
        if schema.kind != "tabular":
            continue
        spec = TabularSpec.model_validate(schema.spec)
        wanted = [*(f"n:{c.name}" for c in spec.numeric), *(f"c:{c.name}" for c in spec.categorical)]
        rows = index.filter((pl.col("presence") & manifest.bit(name)) != 0).sort("key").head(LOOK_INTO)
        columns = ", ".join(map(column, wanted))
        silver = rows.select("key").join(
            con.sql(f"select {_key(manifest)} as key, {columns} from samples").pl(),
            on="key",
            how="left",
            maintain_order="left",
        )
        stored = rows["tab"].explode().to_numpy().reshape(-1, len(wanted))
        for i, of in enumerate(wanted):
            ours, theirs = stored[:, i], silver[of]
            same = _same_numbers(ours, theirs) if i < len(spec.numeric) else _same_names(ours, theirs, spec, i)
            if not same:
                raise ValueError(f"lake: column {of[2:]} holds other values than silver")
        lines.append(f"lake: {rows.height:,} rows of {len(wanted)} columns hold what silver holds")
    return lines


def _same_numbers(ours: np.ndarray, theirs: pl.Series) -> bool:
    with np.errstate(over="ignore"):
        expected = theirs.to_numpy().astype(np.float64).astype(np.float32)
    return bool(np.array_equal(ours, np.where(np.isfinite(expected), expected, np.nan), equal_nan=True))


def _same_names(ours: np.ndarray, theirs: pl.Series, spec: TabularSpec, i: int) -> bool:
    of = spec.categorical[i - len(spec.numeric)]
    known = set(of.values)
    ids = np.nan_to_num(ours, nan=MISSING_ID).astype(int).tolist()
    for category, value in zip(ids, theirs.to_list(), strict=True):
        if category == MISSING_ID:
            right = value is None
        elif category < FIRST_KNOWN_ID + len(of.values) and category != UNSEEN_ID:
            right = value == of.name_of(category)
        else:
            right = value is not None and value not in known
        if not right:
            return False
    return True


def _split_rule(con: "DuckDBPyConnection", manifest: Manifest) -> str:
    rule = split.select(manifest.split_rule, "samples")
    wrong = con.execute(
        f"select count(*) from samples join ({rule}) r using (row_id) where samples.split is distinct from r.split"
    ).fetchall()[0][0]
    if wrong:
        raise ValueError(f"lake: {wrong:,} rows of silver are not in the split that the split rule gives them")
    return f"split: the rule ({manifest.split_rule['method']}) gives every row the split that it is in"


def _times(con: "DuckDBPyConnection", manifest: Manifest, index: pl.DataFrame) -> list[str]:
    """No modality of a sample is later than its ``time``, when the label becomes known (see `etl.sources.samples`)."""
    columns = [row[0] for row in con.execute("describe samples").fetchall()]
    timed = [name for name in manifest.modalities if f"t:{name}" in columns]
    if "time" not in columns or not timed:
        return ["times: the source knows none; nothing to compare"]
    times = ", ".join(f'"t:{name}"' for name in timed)
    rows = con.sql(f"select {_key(manifest)} as key, time, {times} from samples").pl().join(index, on="key")
    lines = []
    for name in timed:
        known = rows.filter(
            ((pl.col("presence") & manifest.bit(name)) != 0)
            & pl.col("time").is_not_null()
            & pl.col(f"t:{name}").is_not_null()
        )
        late = known.filter(pl.col(f"t:{name}") > pl.col("time"))
        if late.height:
            raise ValueError(
                f"times: in {late.height:,} samples the {name} is later than the label, e.g. {late['key'].min()}"
            )
        lines.append(f"times: {name} is never later than the label ({known.height:,} samples with both times)")
    return lines


def _quarantine(manifest: Manifest, folder: Path) -> list[str]:
    files = sorted(folder.glob("*.parquet"))
    found: dict[str, int] = {}
    for file in files:
        for reason, n in pl.read_parquet(file, columns=["reason"])["reason"].value_counts().iter_rows():
            found[reason] = found.get(reason, 0) + n
    if found != manifest.quarantine:
        raise ValueError(f"quarantine: {folder} holds {found}, the manifest says {manifest.quarantine}")
    return [f"quarantine: {sum(found.values()):,} records, as the manifest counts them"]


def _tokenizer(con: "DuckDBPyConnection", gold: Path, manifest: Manifest) -> list[str]:
    """Train the tokenizer again, where it was trained on this dataset."""
    if manifest.tokenizer is None or manifest.fit.get("tokenizer") != "trained":
        return []
    train = "from samples where split = 'train' and text is not null"
    digest = con.execute(
        f"select count(*), bit_xor(('0x' || {_key(manifest)})::ubigint) from samples where split = 'train'"
    )
    n, xor = digest.fetchall()[0]
    if manifest.fit["train"] != f"{n}-{xor or 0:016x}":
        return ["fit: tokenizer not trained again, it was made from another train split"]
    n = con.execute(f"select count(*) {train}").fetchall()[0][0]
    if n > RETRAIN:
        return [f"fit: tokenizer not trained again on {n:,} texts"]
    kept = load_tokenizer(gold / manifest.tokenizer.file)
    limit = int(manifest.fit["max_chars"]) if "max_chars" in manifest.fit else None
    texts = con.execute(f"select text {train}").fetchall()
    made = wordpiece.train((text[:limit] for (text,) in texts), kept.get_vocab_size())
    if made.get_vocab() != kept.get_vocab():
        raise ValueError("fit: the tokenizer is not the one that the train texts give")
    return [f"fit: tokenizer trained again on {n:,} train texts: the same"]

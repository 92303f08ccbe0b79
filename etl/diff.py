"""What differs between two gold datasets: schema, fit, counts, samples by key, quarantine. From manifests and indices."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etl.stats import table
from etl.summary import read_indices
from lanistr.manifest import SPLITS, Manifest, ModalitySchema

if TYPE_CHECKING:
    import polars as pl

SHOWN = 5  # keys that are named


def diff(a: Path, b: Path) -> str:
    """Tables as text; a single line where the two are the same.

    A sample has changed if the content of a member (crc32), its label or its split has. Where it came from (file and row)
    is not its content.

    Raises:
        ValueError: not a gold dataset, or an index is missing.
    """
    first, second = Manifest.load(a), Manifest.load(b)
    if first.content_id == second.content_id and first.quarantine == second.quarantine:
        return f"the same: {first.name} {first.content_id[:16]}"
    blocks = [
        f"a: {first.name}  {first.content_id[:16]}  {a}\nb: {second.name}  {second.content_id[:16]}  {b}",
        _schema(first, second),
        *_samples(read_indices(a, first), read_indices(b, second), first, second),
        _counts("rows at each stage", first.counts, second.counts),
        _counts("quarantine", first.quarantine, second.quarantine),
    ]
    return "\n\n".join(block for block in blocks if block)


def _schema(a: Manifest, b: Manifest) -> str:
    rows = []
    facts_a, facts_b = _facts(a), _facts(b)
    for name in [*facts_a, *(name for name in facts_b if name not in facts_a)]:
        one, two = facts_a.get(name, "-"), facts_b.get(name, "-")
        if one != two:
            rows.append([name, one, two])
    return table(["schema and fit", "a", "b"], rows or [["(no difference)", "", ""]])


def _facts(manifest: Manifest) -> dict[str, str]:
    """What makes the samples of two datasets comparable, as short texts."""
    facts = {
        "labels": ", ".join(manifest.labels),
        "split rule": _short(manifest.split_rule),
        "tokenizer": manifest.tokenizer.sha256[:16] if manifest.tokenizer else "-",
    }
    for name, schema in manifest.modalities.items():
        facts[f"{name}: members"] = ", ".join(schema.stored)
        facts |= {f"{name}: {key}": value for key, value in _spec(schema).items()}
    return facts


def _spec(schema: ModalitySchema) -> dict[str, str]:
    """A line per key of a spec; lists of columns by name."""
    facts = {}
    for key, value in schema.spec.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and "name" in value[0]:
            facts |= {f"{key} {column['name']}": _short(column) for column in value}
        else:
            facts[key] = _short(value)
    return facts


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:22]}... {hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _samples(x: "pl.DataFrame", y: "pl.DataFrame", a: Manifest, b: Manifest) -> list[str]:
    masks = _counts("samples by split and modalities", _by_mask(x, a), _by_mask(y, b))
    one, two = _contents(x, a), _contents(y, b)
    added, removed = sorted(two.keys() - one.keys()), sorted(one.keys() - two.keys())
    changed = sorted(key for key in one.keys() & two.keys() if one[key] != two[key])
    rows = [
        [what, f"{len(keys):,}", ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")]
        for what, keys in (("only in a", removed), ("only in b", added), ("changed", changed))
    ]
    rows.append(["same", f"{len(one.keys() & two.keys()) - len(changed):,}", ""])
    return [masks, table(["samples by key", "n", "keys"], rows)]


def _by_mask(samples: "pl.DataFrame", manifest: Manifest) -> dict[str, int]:
    counts = samples.group_by("split", "presence").len().sort("split", "presence").iter_rows()
    found = {}
    for split, mask, n in counts:
        names = [name for name in manifest.modalities if mask & manifest.bit(name)]
        found[f"{split}: {' + '.join(names) or 'nothing'}"] = n
    order = {split: i for i, split in enumerate(SPLITS)}
    return dict(sorted(found.items(), key=lambda item: (order[item[0].split(":")[0]], item[0])))


def _contents(samples: "pl.DataFrame", manifest: Manifest) -> dict[str, tuple[Any, ...]]:
    """Key -> split, label name and the sorted (member, crc32) that are there."""
    members = [member for schema in manifest.modalities.values() for member in schema.stored]
    label = "label" if manifest.target == "class" else "target"
    columns = ["key", "split", label, *(f"{field}/{m}" for m in members for field in ("offset", "crc32"))]
    found = {}
    for key, split, label, *rest in samples.select(columns).iter_rows():
        crcs = [(m, rest[2 * i + 1]) for i, m in enumerate(members) if rest[2 * i] >= 0]
        found[key] = (split, _name(manifest, label), sorted(crcs))
    return found


def _name(manifest: Manifest, label: Any) -> str:
    if manifest.target != "class":
        return str(label)
    return manifest.labels[label] if 0 <= label < len(manifest.labels) else ""


def _counts(head: str, a: dict[str, int], b: dict[str, int]) -> str:
    names = [*a, *(name for name in b if name not in a)]
    rows = [
        [name, f"{a.get(name, 0):,}", f"{b.get(name, 0):,}", f"{b.get(name, 0) - a.get(name, 0):+,}"]
        for name in names
        if a.get(name, 0) != b.get(name, 0)
    ]
    return table([head, "a", "b", "b - a"], rows or [["(no difference)", "", "", ""]])

"""Foreign WebDataset tars, written by webdataset itself, are indexed and read by the training reader."""

import io
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from etl.__main__ import main
from etl.build import build
from etl.index import index
from etl.verify import verify
from lanistr.data.reader import GoldDataset
from lanistr.manifest import Manifest
from lanistr.modalities.image import ImageModality
from lanistr.modalities.text import TextModality
from tests.etl.test_build import recipe_of, write_raw


def picture(colour: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 32), (colour, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def write_foreign(path: Path, first: int, **extra: bytes) -> Path:
    """Ten samples: the image is a JPEG or a PNG, every fifth has none."""
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(first, first + 10):
            sample: dict[str, object] = {"__key__": f"shop/{i:06d}", "cls": str(i % 3).encode(), **extra}
            if i % 5:
                sample["png" if i % 2 else "jpg"] = picture(20 * (i % 10), "png" if i % 2 else "jpeg")
            writer.write(sample)
    return path


def image_modality(gold: Path) -> ImageModality:
    schema = Manifest.load(gold).modalities["image"]
    return ImageModality("image", {"size": 32, "patch": 16, "hidden": 8, "layers": 1, "heads": 1}, schema)


def test_foreign_tars_are_indexed_where_they_are_and_read(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    train = [write_foreign(tmp_path / "tars" / f"part-{i}.tar", 10 * i) for i in range(2)]
    val = write_foreign(tmp_path / "tars" / "val.tar", 20)
    out = tmp_path / "gold" / "shop"
    index({"train": train, "val": [val]}, out, size=32)
    assert verify(out)[-1].startswith("ok")
    data = GoldDataset(out, "train", {"image": image_modality(out)})
    assert data.keys == [f"shop/{i:06d}" for i in range(20)]
    assert data.label.tolist() == [i % 3 for i in range(20)]
    for i in range(20):
        sample = data.read(i)
        assert bool(sample.presence) == bool(i % 5)
        if i % 5:
            assert abs(int(sample.contents["image"][0, 0, 0]) - 20 * (i % 10)) <= 2  # the red of the first pixel


def test_what_training_cannot_read_is_one_line_or_left_out_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar, out = write_foreign(tmp_path / "a.tar", 0, txt=b"a caption"), tmp_path / "gold"
    assert main(["index", str(tar), "--out", str(out)]) == 2
    assert "000000.txt: training cannot read it as it is" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]
    assert main(["index", str(tar), "--out", str(out), "--ignore", "txt"]) == 0
    assert Manifest.load(out).counts == {"samples": 10, "members .txt left out": 10}
    assert verify(out)[-1].startswith("ok")
    with pytest.raises(ValueError, match="there already"):
        index({"train": [tar]}, out)
    with pytest.raises(ValueError, match=r"occurs in .* and again in"):
        index({"train": [tar], "val": [tar]}, tmp_path / "twice", ignore=["txt"])
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b" + bytes(50))
    with pytest.raises(ValueError, match="not a plain tar"):
        index({"train": [tmp_path / "a.tar.gz"]}, tmp_path / "packed")


def test_a_lost_index_of_our_own_tars_is_made_again_from_the_tars(tmp_path: Path) -> None:
    gold = build(
        recipe_of(text={"tokenizer": {"train": 200}, "max_tokens": 16, "keep_raw": True}),
        write_raw(tmp_path / "raw"),
        tmp_path / "lake",
    )
    tars = {split: sorted((gold / split).glob("*.tar")) for split in ("train", "val", "test")}
    out = tmp_path / "again"
    index(tars, out, like=gold)
    assert verify(out)[-1].startswith("ok")
    schema = Manifest.load(gold).modalities["text"]
    assert schema.extras == ["txt"]
    text = TextModality("text", {"hidden": 8, "layers": 1, "heads": 1, "intermediate": 8, "max_tokens": 16}, schema)
    one, two = (GoldDataset(folder, "train", {"text": text}) for folder in (gold, out))
    assert (one.keys, one.presence.tolist(), one.label.tolist()) == (
        two.keys,
        two.presence.tolist(),
        two.label.tolist(),
    )
    for i in range(one.n):
        a, b = one.read(i).contents, two.read(i).contents
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in a)

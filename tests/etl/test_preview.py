"""`etl preview`: self-contained, escaped, honest about what is absent."""

import base64
import gzip
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from etl.__main__ import main
from etl.build import build
from etl.summary import Summary
from lanistr.manifest import Manifest
from tests.etl.test_build import RECIPE, recipe_of, write_raw


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.tags)


@pytest.fixture(scope="module")
def gold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preview")
    raw = write_raw(folder / "raw")
    items = gzip.decompress((raw / "items.csv.gz").read_bytes()).replace(b",a\n", b",<script>alert(1)</script>\n")
    (raw / "items.csv.gz").write_bytes(gzip.compress(items))
    tree = {**RECIPE, "text": {**RECIPE["text"], "max_tokens": 64}}
    return build(recipe_of(tree), raw, folder / "lake")


def page(gold: Path, tmp_path: Path, *arguments: str) -> str:
    out = tmp_path / "page.html"
    assert main(["preview", str(gold), "--out", str(out), *arguments]) == 0
    return out.read_text()


def test_page_is_self_contained_and_hostile_values_are_escaped(gold: Path, tmp_path: Path) -> None:
    text = page(gold, tmp_path, "--cards", "120")
    found = Page(text)
    assert not found.count("script")
    assert not found.count("link")
    assert "&lt;script&gt;" in text
    assert all((attrs["src"] or "").startswith("data:") for tag, attrs in found.tags if tag == "img")


def test_cards_show_what_is_there_and_say_what_is_absent(gold: Path, tmp_path: Path) -> None:
    text = page(gold, tmp_path, "--cards", "120")
    manifest = json.loads((gold / "manifest.json").read_text())
    missing = dict.fromkeys(manifest["modalities"], 0)
    for shard in manifest["shards"]:
        for mask, n in shard["n_by_mask"].items():
            for bit, name in enumerate(missing):
                missing[name] += 0 if int(mask) >> bit & 1 else n
    assert Page(text).count("article") == 120
    for name, n in missing.items():
        assert text.count(f">no {name}<") == n
    assert "a note on item number" in text
    photos = re.findall(r"base64,([^']+)'", text)
    assert len(photos) == 120 - missing["image"]
    Image.open(io.BytesIO(base64.b64decode(photos[0]))).load()


def test_few_cards_show_every_missingness_pattern(gold: Path, tmp_path: Path) -> None:
    few = page(gold, tmp_path, "--cards", "8")
    found = Page(few)
    assert found.count("article") == 8
    patterns = {tuple(sorted(re.findall(r">no (\w+)<", card))) for card in few.split("<article>")[1:]}
    shards = json.loads((gold / "manifest.json").read_text())["shards"]
    assert len(patterns) == len({mask for shard in shards for mask in shard["n_by_mask"]}) > 4


def test_not_a_dataset_is_one_line_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", str(tmp_path), "--out", str(tmp_path / "x.html")]) == 2
    assert "no manifest.json" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()


def test_private_data_is_hidden_unless_asked_for(gold: Path, tmp_path: Path) -> None:
    shown, hidden = page(gold, tmp_path, "--cards", "120"), page(gold, tmp_path, "--cards", "120", "--redact")
    key = re.findall(r"<h3>([0-9a-f]{16})</h3>", shown)
    assert len(set(key)) == 120
    assert "base64," in shown
    for secret in (*key, "a note on item number", "base64,"):
        assert secret not in hidden
    assert "text of " in hidden
    assert "identifying values are hidden" in hidden
    assert "identifying values are hidden" not in shown
    manifest = Manifest.load(gold)
    assert not manifest.private
    manifest.private = True
    private = tmp_path / "private"
    shutil.copytree(gold, private)
    manifest.save(private)
    assert "a note on item number" not in page(private, tmp_path)
    assert "a note on item number" in page(private, tmp_path, "--no-redact", "--cards", "120")


def test_the_page_shows_what_the_dataset_holds(gold: Path, tmp_path: Path) -> None:
    text = page(gold, tmp_path)
    manifest = Manifest.load(gold)
    for mask, n in Summary(gold).patterns:
        assert f"<td class=num>{n:,}<td" in text, mask
    for column in ("weight", "kind", "<b>p</b>", "<b>q</b>", "text, tokens", "timeseries, steps"):
        assert column in text
    for parent in manifest.parents:
        assert parent["sha256"] in text
    assert "alone it tells this class from the others" in text  # the toy's photos and kinds do give its label away


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: the page is not looked at in a browser")
def test_a_browser_has_nothing_to_complain_of(gold: Path, tmp_path: Path) -> None:
    page(gold, tmp_path)
    assert CHROMIUM
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += (
        " --disable-component-update --disable-sync --enable-logging=stderr --hide-scrollbars --window-size=400,900"
    )
    target, profile = tmp_path / "page.png", tmp_path / "profile"
    command = [
        CHROMIUM,
        *flags.split(),
        f"--user-data-dir={profile}",
        f"--screenshot={target}",
        str(tmp_path / "page.html"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    with Image.open(target) as picture:
        assert picture.size == (400, 900)
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 20

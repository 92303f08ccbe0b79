"""`etl images` against a local server that stalls, lies, throttles, truncates and redirects; hostile URLs and names."""

import asyncio
import hashlib
import io
import json
import os
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from etl.__main__ import main
from etl.build import build
from etl.fetch import Failed, Fetcher, Limits, check_image, checked_url
from etl.images import fetch_images, wanted_images
from etl.recipe import Recipe
from etl.sources.models import AmazonSource
from lanistr.manifest import Manifest

DATA = Path(os.environ.get("LANISTR_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"))
AMAZON = DATA / "amazon_reviews_2018"


def picture(size: tuple[int, int] = (40, 30), kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(buffer, kind)
    return buffer.getvalue()


GOOD, PNG = picture(), picture(kind="PNG")
NOISE = io.BytesIO()
Image.effect_noise((200, 200), 80).save(NOISE, "JPEG")


class Shop(ThreadingHTTPServer):
    """Counts requests per path, and how many ran at once."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: Counter[str] = Counter()
        self.running = self.most = 0
        self.lock = threading.Lock()
        self.url = f"http://localhost:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Shop

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.seen[self.path] += 1
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
            attempt = self.server.seen[self.path]
        try:
            getattr(self, self.path.split("/")[1].split(".")[0], self.missing)(attempt)
        finally:
            with self.server.lock:
                self.server.running -= 1

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def missing(self, _: int) -> None:
        self.answer(404)

    def good(self, _: int) -> None:
        time.sleep(0.02)
        self.answer(200, GOOD, Content_Type="text/html")  # the type lies, the content does not

    def png(self, _: int) -> None:
        self.answer(200, PNG)

    def html(self, _: int) -> None:
        self.answer(200, b"<html>sorry, no image here</html>", Content_Type="image/jpeg")

    def spacer(self, _: int) -> None:
        self.answer(200, picture((1, 1), "GIF"))

    def huge(self, _: int) -> None:
        self.answer(200, b"", Content_Length=str(10**12))

    def endless(self, _: int) -> None:
        self.send_response(200)
        self.end_headers()
        for _i in range(10_000):
            self.wfile.write(b"x" * 10_000)

    def bomb(self, _: int) -> None:
        head = b"IHDR" + struct.pack(">II", 20_000, 20_000) + PNG[24:29]
        self.answer(200, PNG[:12] + head + struct.pack(">I", zlib.crc32(head)) + PNG[33:])

    def stall(self, _: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(GOOD)))
        self.end_headers()
        self.wfile.write(GOOD[:10])
        time.sleep(1.5)

    def short(self, _: int) -> None:
        self.answer(200, GOOD[: len(GOOD) // 2], Content_Length=str(len(GOOD)), Connection="close")
        self.close_connection = True

    def cut(self, _: int) -> None:
        self.answer(200, NOISE.getvalue()[:5000])

    def throttled(self, attempt: int) -> None:
        if attempt < 3:
            self.answer(429, b"", Retry_After="0")
        else:
            self.answer(200, GOOD)

    def flaky(self, attempt: int) -> None:
        if attempt < 3:
            self.answer(500 if attempt == 1 else 503)
        else:
            self.answer(200, GOOD)

    def broken(self, _: int) -> None:
        self.answer(500)

    def moved(self, _: int) -> None:
        self.answer(302, b"", Location="/good/after-redirect")

    def loop(self, _: int) -> None:
        self.answer(302, b"", Location=self.path)

    def file(self, _: int) -> None:
        self.answer(302, b"", Location="file:///etc/passwd")

    def inside(self, _: int) -> None:
        self.answer(302, b"", Location=f"http://127.0.0.1:{self.server.server_port}/good/secret")


@pytest.fixture
def shop() -> Iterator[Shop]:
    server = Shop()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def limits(**changes: Any) -> Limits:
    quick = {"timeout": 0.4, "retries": 2, "backoff": 0.01, "max_bytes": 1 << 20, "allow": frozenset({"localhost"})}
    return Limits(**{**quick, **changes})


def reason(url: str, **changes: Any) -> str:
    async def attempt() -> str:
        async with Fetcher(limits(**changes)) as fetcher:
            try:
                data = await fetcher.image(url)
            except Failed as failure:
                return failure.reason
            return f"ok {hashlib.sha256(data).hexdigest()}"

    return asyncio.run(attempt())


OK = f"ok {hashlib.sha256(GOOD).hexdigest()}"
ANSWERS = {  # path -> (outcome, requests it takes with two retries)
    "good": (OK, 1),
    "throttled": (OK, 3),
    "flaky": (OK, 3),
    "moved": (OK, 1),
    "404": ("HTTP 404", 1),
    "broken": ("HTTP 500", 3),
    "html": ("not an image", 1),
    "spacer": ("a spacer, not an image", 1),
    "huge": ("too many bytes", 1),
    "endless": ("too many bytes", 1),
    "bomb": ("too many pixels", 1),
    "stall": ("timeout", 3),
    "short": ("truncated or not HTTP", 3),
    "cut": ("truncated image", 3),
    "loop": ("too many redirects", 6),
    "file": ("scheme file is not http or https", 1),
    "inside": ("address is not public", 1),
}


@pytest.mark.parametrize("path", ANSWERS)
def test_every_kind_of_answer_has_its_outcome(path: str, shop: Shop) -> None:
    outcome, requests = ANSWERS[path]
    assert reason(f"{shop.url}/{path}/x.jpg") == outcome
    assert shop.seen[f"/{path}/x.jpg"] == requests
    assert "/good/secret" not in shop.seen


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.com/x.jpg",
        "data:image/png;base64,AAAA",
        "//example.com/x.jpg",
        "/etc/passwd",
        "http:///x.jpg",
        "http://user:password@example.com/x.jpg",
        "http://[::1",
        "http://exa mple/\x00",
        "",
        "javascript:alert(1)",
    ],
)
def test_a_url_that_is_no_web_address_is_never_opened(url: str) -> None:
    with pytest.raises(Failed, match=r"scheme|not a URL"):
        checked_url(url)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "[::1]", "localhost", "10.0.0.1", "169.254.169.254", "0.0.0.0", "[::ffff:127.0.0.1]", "2130706433"],
)
def test_private_addresses_are_refused_unless_allowed(host: str, shop: Shop) -> None:
    assert reason(f"http://{host}:{shop.server_port}/good/x", allow=frozenset(), retries=0) == "address is not public"
    assert not shop.seen


def test_requests_to_one_host_are_limited(shop: Shop) -> None:
    async def many() -> None:
        async with Fetcher(limits(per_host=3, timeout=5.0)) as fetcher:
            await asyncio.gather(*(fetcher.image(f"{shop.url}/good/{i}") for i in range(20)))

    asyncio.run(many())
    assert shop.seen.total() == 20
    assert 1 < shop.most <= 3


def test_a_spacer_is_measured_by_its_shorter_side() -> None:
    check_image(picture((8, 200)), 8)
    with pytest.raises(Failed, match="spacer"):
        check_image(picture((7, 200)), 8)


def raw_shop(folder: Path, urls: dict[str, list[str]], reviews: dict[str, list[str]] | None = None) -> Path:
    """A category with a product per key, each with one review."""
    folder.mkdir()
    review = {"overall": 5.0, "reviewerID": "r", "unixReviewTime": 1529193600, "reviewText": "fine"}
    own = reviews or {}
    lines = [review | {"asin": asin, "image": own.get(asin)} for asin in {**urls, **own}]
    (folder / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    products = [{"asin": asin, "imageURL": found, "imageURLHighRes": []} for asin, found in urls.items()]
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, [*products, {"asin": "unreviewed", "imageURL": ["x"]}])))
    return folder


RECIPE = {
    "name": "shop",
    "source": {"kind": "amazon2018", "reviews": "r.jsonl", "metadata": "m.jsonl", "images": "images"},
    "image": {"size": 16},
    "tabular": {},
}


def status_of(raw: Path) -> dict[str, dict[str, Any]]:
    return {row["file"]: row for row in pq.read_table(raw / "images" / "_status.parquet").to_pylist()}


def test_a_second_run_skips_what_is_done_and_tries_again_what_failed(shop: Shop, tmp_path: Path) -> None:
    raw = raw_shop(
        tmp_path / "raw",
        {
            "A1": [f"{shop.url}/good/1"],
            "A2": [f"{shop.url}/404/2", f"{shop.url}/png/2"],
            "A3": [f"{shop.url}/throttled/3"],
            "A4": [],
        },
        {"A4": [f"{shop.url}/good/4"], "A1": [f"{shop.url}/good/never"]},
    )
    recipe = Recipe.model_validate(RECIPE)
    first = fetch_images(recipe, raw, limits(retries=0))
    assert first == {"ok": 3, "HTTP 429": 1, "ok before": 0}
    rows = status_of(raw)
    assert {name: row["status"] for name, row in rows.items()} == {
        "A1.jpg": "ok",
        "A2.jpg": "ok",
        "A3.jpg": "failed",
        "A4.jpg": "ok",
    }
    assert (raw / "images" / "A1.jpg").read_bytes() == GOOD
    assert rows["A1.jpg"]["sha256"] == hashlib.sha256(GOOD).hexdigest()
    assert rows["A1.jpg"]["bytes"] == len(GOOD)
    assert rows["A2.jpg"]["url"].endswith("/png/2")
    asked = Counter(shop.seen)
    (raw / "images" / "A4.jpg").unlink()
    second = fetch_images(recipe, raw, limits())
    assert second == {"ok": 2, "ok before": 2}
    assert set(shop.seen - asked) == {"/throttled/3", "/good/4"}
    assert "/good/never" not in shop.seen
    assert all(row["status"] == "ok" for row in status_of(raw).values())
    gold = build(recipe, raw, tmp_path / "lake")
    assert sum(n for s in Manifest.load(gold).shards for mask, n in s.n_by_mask.items() if int(mask) & 1) == 4


def test_a_run_that_was_killed_before_its_status_adopts_its_files(shop: Shop, tmp_path: Path) -> None:
    raw = raw_shop(tmp_path / "raw", {"A1": [f"{shop.url}/good/1"], "A2": [f"{shop.url}/good/2"]})
    (raw / "images").mkdir()
    (raw / "images" / "A1.jpg").write_bytes(GOOD)
    (raw / "images" / "A2.jpg").write_bytes(GOOD[:200])
    (raw / "images" / ".A2.jpg.x.tmp").write_bytes(GOOD[:100])
    assert fetch_images(Recipe.model_validate(RECIPE), raw, limits()) == {"ok": 1, "ok before": 1}
    assert set(shop.seen) == {"/good/2"}
    assert (raw / "images" / "A2.jpg").read_bytes() == GOOD


def test_hostile_names_and_urls_touch_nothing_outside(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"mine")
    names = ["../secret", "a/b", "..", ".", "x" * 300, "a\x00b", "C:\\x", "é"]
    urls = {name: [f"{shop.url}/good/x"] for name in names}
    urls |= {"F1": [f"file://{tmp_path}/secret.jpg"], "F2": ["../secret.jpg"], "F3": [f"{shop.url}/file/1"]}
    urls["LINK"] = [f"{shop.url}/good/link"]
    raw = raw_shop(tmp_path / "raw", urls)
    (raw / "images").mkdir()
    (raw / "images" / "LINK.jpg").symlink_to(tmp_path / "secret.jpg")
    outcomes = fetch_images(Recipe.model_validate(RECIPE), raw, limits())
    assert outcomes["odd product id"] == len(names)
    assert outcomes["ok"] == 1
    assert (tmp_path / "secret.jpg").read_bytes() == b"mine"
    assert {p.name for p in tmp_path.iterdir()} == {"raw", "secret.jpg"}
    assert {p.name for p in (raw / "images").iterdir()} == {"LINK.jpg", "_status.parquet"}
    assert not (raw / "images" / "LINK.jpg").is_symlink()


@pytest.mark.parametrize("images", ["../outside", "/tmp/outside"])
def test_the_images_folder_must_lie_in_the_raw_folder(images: str, tmp_path: Path) -> None:
    raw = raw_shop(tmp_path / "raw", {})
    recipe = Recipe.model_validate({**RECIPE, "source": {**RECIPE["source"], "images": images}})
    with pytest.raises(ValueError, match="leaves the raw folder"):
        fetch_images(recipe, raw, limits())


def test_command_line(shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = raw_shop(tmp_path / "raw", {"A1": [f"{shop.url}/good/1"], "A2": [f"{shop.url}/html/2"]})
    (tmp_path / "shop.yaml").write_text(json.dumps(RECIPE))
    command = ["images", str(tmp_path / "shop.yaml"), "--raw", str(raw), "--timeout", "2"]
    assert main([*command, "--retries", "0"]) == 0
    assert "2  address is not public" in capsys.readouterr().out
    assert main([*command, "--allow-host", "localhost"]) == 0
    out = capsys.readouterr().out
    assert "1  ok" in out
    assert "1  not an image" in out
    assert main(["images", "demo", "--raw", str(raw)]) == 2
    assert "amazon2018 sources" in capsys.readouterr().err


@pytest.mark.skipif(not AMAZON.is_dir(), reason="the real Amazon reviews are not here (set LANISTR_DATA)")
def test_urls_of_the_real_gift_cards_and_of_a_csv() -> None:
    gifts = AmazonSource(kind="amazon2018", reviews="Gift_Cards_5.json.gz", metadata="meta_Gift_Cards.json.gz")
    wanted = wanted_images(gifts, AMAZON)
    assert wanted["B004LLIKVU"][0].startswith("https://images-na.ssl-images-amazon.com/images/I/")
    assert all(checked_url(url).scheme == "https" for urls in wanted.values() for url in urls)
    office = AmazonSource(kind="amazon2018", reviews="Office_Products_5_balanced9000.csv.gz")
    assert len(wanted_images(office, AMAZON)) > 150

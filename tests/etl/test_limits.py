from pathlib import Path
from typing import Any

import duckdb
import pytest

from etl import prepare
from etl.__main__ import main
from etl.build import build
from etl.ingest import connect
from tests.etl.test_build import bytes_of, recipe_of, write_raw


def test_work_larger_than_the_memory_limit_spills_to_the_given_folder(tmp_path: Path) -> None:
    spill = tmp_path / "spill"
    con = connect(tmp_path, spill=spill, memory=200 * 10**6, threads=1)
    limit = con.execute("select current_setting('memory_limit'), current_setting('threads')").fetchall()[0]
    assert limit == ("95.3 MiB", 1)
    con.execute(
        "create table wide as select md5(i::varchar) as a, repeat(md5(i::varchar), 8) as b from range(500_000) t(i)"
    )
    spilled: list[int] = []
    ordered = con.execute("select a, b from wide order by a")
    spilled.append(sum(path.stat().st_size for path in spill.rglob("*")))
    first = ordered.fetchmany(2)
    assert first[0] < first[1]
    assert spilled[0] > 10 * 10**6


def test_more_memory_is_used_only_where_the_frugal_road_failed(tmp_path: Path) -> None:
    limits = []
    for frugal in (True, False):
        con = connect(tmp_path, memory=2 * 10**9, threads=2, frugal=frugal)
        limits += con.execute("select current_setting('memory_limit')").fetchall()[0]
        con.close()
    assert limits == ["190.7 MiB", "1.1 GiB"]


def test_a_build_that_runs_out_of_memory_tries_once_more_with_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = write_raw(tmp_path / "raw")
    undisturbed = bytes_of(build(recipe_of(), raw, tmp_path / "undisturbed"))
    original, starved = prepare.silver.write_tables, [1]

    def starve(*arguments: Any) -> Any:
        if starved:
            starved.pop()
            raise duckdb.OutOfMemoryException("Out of Memory Error: could not allocate block")
        return original(*arguments)

    monkeypatch.setattr(prepare.silver, "write_tables", starve)
    assert bytes_of(build(recipe_of(), raw, tmp_path / "lake")) == undisturbed
    assert "once more" in capsys.readouterr().err
    starved += [1, 1]
    with pytest.raises(ValueError, match="out of memory with this machine's memory: give more"):
        build(recipe_of(), raw, tmp_path / "poor")
    assert not list((tmp_path / "poor").rglob("*.parquet"))


@pytest.mark.parametrize(
    "flag, value, message",
    [("--memory", "lots", "at least 200MB"), ("--memory", "1MB", "at least 200MB"), ("--threads", "0", "at least 1")],
)
def test_a_limit_that_makes_no_sense_is_one_line(
    flag: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["build", "demo", "--raw", ".", "--lake", "lake", flag, value])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_spill_folder_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lake = tmp_path / "lake"
    assert main(["build", "demo", "--raw", str(tmp_path), "--lake", str(lake), "--tmp", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert not lake.exists()

from pathlib import Path

from etl.ingest import connect, load, register
from etl.quarantine import Quarantine


def test_a_filtered_read_stores_only_the_rows_asked_for_and_keeps_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("itemid,value\n1,a\n2,b\n1,c\n3,d\n")
    con = connect(tmp_path)
    n = load(con, Quarantine(con), register(tmp_path, "events.csv"), "t", ["value"], where="itemid in ('1', '3')")
    assert n == 3
    assert con.execute("select value, _row from t order by _row").fetchall() == [("a", 1), ("c", 3), ("d", 4)]

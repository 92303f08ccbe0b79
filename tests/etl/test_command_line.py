"""How the command line of the ETL is read."""

from pathlib import Path

import pytest

from etl.__main__ import main


@pytest.mark.parametrize("place", [1, 3])
def test_overrides_count_wherever_they_stand(place: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["build", "demo", "--raw", str(tmp_path), "--lake", str(tmp_path / "lake")]
    command.insert(2 * place, "source.mane=x.csv")
    assert main(command) == 2
    assert "unknown key 'source.mane'; did you mean 'main'?" in capsys.readouterr().err


@pytest.mark.parametrize("extra", ["--wokers=3", "nonsense"])
def test_what_is_no_override_is_refused(extra: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["build", "demo", "--raw", str(tmp_path), "--lake", str(tmp_path / "lake"), extra])
    assert raised.value.code == 2
    assert f"unrecognized arguments: {extra}" in capsys.readouterr().err


def test_a_command_without_overrides_takes_none(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["verify", str(tmp_path), "a=b"])

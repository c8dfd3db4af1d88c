# SPDX-License-Identifier: Apache-2.0
"""The matrix of scores: tables, names of rows and runs, damaged files."""

import json
from pathlib import Path

import pytest

from ftkd_core.errors import UserError
from tests.training.study.helpers import entry
from training.study.experiments import main
from training.study.json_files import write_json
from training.study.matrix import ROWS, choose_rows, method_of, read_matrix, seed_of, subset_table, table


def test_table_has_mean_and_deviation_in_the_order_of_the_rows() -> None:
    entries = [entry("ftkd", 0, 0.2), entry("none", 0, 0.1), entry("ftkd", 1, 0.4), entry("teacher", 0, 0.5)]
    lines = table(entries).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| teacher", "| none", "| ftkd"]
    assert "| 2 | 100 | 0.300 ± 0.141 |" in lines[4]
    assert "±" not in lines[2]


def test_subset_table_shows_missing_scores_as_a_dash() -> None:
    assert subset_table([entry("none", 0, 0.1)], "AP") == ""
    parts = {"near": {"AP": 0.5, "AVE": None}, "far": {"AP": 0.25, "AVE": 1.0}}
    lines = subset_table([entry("none", 0, 0.1, subsets=parts)], "AVE").splitlines()
    assert lines[2] == "| none | - | 1.000 |"


def test_names_of_rows_and_runs() -> None:
    assert choose_rows("") == list(ROWS)
    assert choose_rows("none,ftkd") == ["none", "ftkd"]
    with pytest.raises(UserError, match="unknown row 'fgd'"):
        choose_rows("none,fgd")
    assert (method_of("ftkd-12"), seed_of("ftkd-12"), method_of("teacher")) == ("ftkd", 12, "teacher")
    with pytest.raises(UserError, match="run 'notes' has no seed in its name"):
        seed_of("notes")


@pytest.mark.parametrize("content", [None, "", '[{"method": "no', '{"a": 1}', '[{"method": "none"}]'])
def test_missing_damaged_or_foreign_matrix_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    path = tmp_path / "matrix.json"
    if content is not None:
        path.write_text(content)
    assert main(["--table", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot be read" in error or "is not a matrix: expected a list of runs with" in error


def test_matrix_file_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "matrix.json"
    write_json(path, [entry("none", 0, 0.25)])
    assert read_matrix(path) == [entry("none", 0, 0.25)]
    assert main(["--table", str(path)]) == 0
    assert "| none | 1 | 100 | 0.250 |" in capsys.readouterr().out


def test_json_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]

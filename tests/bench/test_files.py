# SPDX-License-Identifier: Apache-2.0
"""Rows survive their files; bad files are refused in one line; files of the first schema can still be read."""

import dataclasses
import json
import math
import re

import pytest

from bench import cli, files, record, rows
from bench.rows import Row

ROW = Row(
    kernel="op",
    provider="cpp",
    mode="forward",
    dtype="float32",
    B=1,
    T=2,
    N=3,
    K=4,
    V=5,
    shape='tiny, with a | and a "quote"',
    median_ms=1.5,
    p20_ms=1.0,
    p80_ms=2.0,
    runs=3,
    config={"clip": None, "Nq": 1},
    samples_ms=(1.0, 1.5, 2.0),
    date="2026-01-01",
)
OOM = dataclasses.replace(ROW, mode="backward", status="oom", note="out of memory, M²", median_ms=None, samples_ms=())


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_rows_survive_a_file(suffix, tmp_path):
    path = tmp_path / "deep" / f"rows{suffix}"
    with files.Writer([path]) as writer:
        writer.append(ROW)
        writer.append(OOM)
    assert files.read(path) == [ROW, OOM]


def test_markdown_has_one_line_a_row_and_no_stray_columns(tmp_path):
    path = tmp_path / "rows.md"
    with files.Writer([path]) as writer:
        writer.append(ROW)
        writer.append(dataclasses.replace(ROW, note="a | b"))
    lines = path.read_text().splitlines()
    assert len(lines) == 4
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_a_row_is_in_the_file_as_soon_as_it_is_appended(tmp_path):
    path = tmp_path / "rows.jsonl"
    writer = files.Writer([path])
    writer.append(ROW)
    assert files.read(path) == [ROW]
    writer.close()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", "", "the file is empty"),
        ("a.csv", "", "the file is empty"),
        ("a.csv", "kernel,provider\n", "holds no rows"),
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("a.jsonl", "[1]", "row 1: expected a mapping"),
        ("a.jsonl", "{}", "row 1: no column kernel, provider"),
        ("a.jsonl", json.dumps(ROW.to_dict() | {"surprise": 1}), "unknown surprise"),
        ("a.jsonl", json.dumps(ROW.to_dict() | {"T": "many"}), "T is 'many'"),
        ("a.jsonl", json.dumps(ROW.to_dict() | {"median_ms": "fast"}), "median_ms is 'fast'"),
        ("a.jsonl", json.dumps(ROW.to_dict() | {"median_ms": None}), "status ok has no median_ms"),
        ("a.jsonl", json.dumps(ROW.to_dict() | {"status": "great"}), "status is 'great'"),
        ("a.csv", files.to_csv(ROW) + "\n" + files.to_csv(ROW), "no column kernel"),
        ("a.csv", ",".join(rows.COLUMNS) + "\nop,cpp\n", "another number of columns"),
        ("a.txt", "hello", "rows are read from"),
        ("a.json", "{", "not a JSON file"),
        ("a.json", "[]", "not a benchmark record"),
        ("a.json", '{"kind": "op", "rows": [], "schema": 0}', "schema 0"),
        ("a.json", '{"kind": "op", "rows": [{}], "schema": 1}', "a row that cannot be read"),
        ("a.json", '{"kind": "test-gpu", "rows": [], "schema": 1}', "python -m bench show"),
        ("missing.jsonl", None, "cannot be read"),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_it(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        files.read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


CHECK = ROW.to_dict() | {
    "mode": "check",
    "config": {
        "clip": 1.0,
        "repeats": 3,
        "different_repeats": 0,
        "tensors": {"y": {"ok": True, "worst_ratio": 0.5, "worst_slice": "all"}},
    },
}
DAMAGES = [
    (ROW.to_dict(), {"config": {"Nq": "many"}}, "config.Nq is 'many', expected a number of heads that divides N = 3"),
    (ROW.to_dict(), {"config": {"Nv": 2}}, "config.Nv is 2"),
    (ROW.to_dict(), {"config": {"clip": [1]}}, r"config.clip is \[1\]"),
    (ROW.to_dict(), {"config": {"threads": "two"}}, "config.threads is 'two'"),
    (ROW.to_dict(), {"config": {"pattern": 7}}, "config.pattern is 7"),
    (ROW.to_dict(), {"config": {"version": {}}}, "config.version is"),
    (ROW.to_dict(), {"samples_ms": 5}, "samples_ms is 5, expected a list"),
    (ROW.to_dict(), {"samples_ms": [1.0, "fast"]}, "samples_ms is"),
    (ROW.to_dict(), {"provider": 7}, "provider is 7, expected text"),
    (ROW.to_dict(), {"kernel": None}, "kernel is None, expected text"),
    (ROW.to_dict(), {"mode": "sideways"}, "mode is 'sideways', expected one of"),
    (ROW.to_dict(), {"mode": ""}, "mode is ''"),
    (ROW.to_dict(), {"date": None}, "date is None, expected text"),
    (ROW.to_dict(), {"note": 3}, "note is 3, expected text"),
    (ROW.to_dict(), {"driver": 3}, "driver is 3, expected text"),
    (ROW.to_dict(), {"runs": "20"}, "runs is '20', expected a whole number"),
    (ROW.to_dict(), {"B": 0}, "B is 0, expected a whole number of at least 1"),
    (ROW.to_dict(), {"median_ms": math.nan}, "median_ms is nan, expected a number, finite"),
    (ROW.to_dict(), {"median_ms": math.inf}, "median_ms is inf"),
    (ROW.to_dict(), {"median_ms": -1.0}, "median_ms is -1.0"),
    (ROW.to_dict(), {"p20_ms": math.nan}, "p20_ms is nan"),
    (ROW.to_dict(), {"peak_mib": 10**400}, "peak_mib is"),
    (CHECK, {"config": CHECK["config"] | {"tensors": 5}}, "config.tensors is 5, expected a mapping"),
    (CHECK, {"config": CHECK["config"] | {"tensors": {"y": 5}}}, r"config.tensors\['y'\] is 5"),
    (CHECK, {"config": CHECK["config"] | {"tensors": {"y": {"ok": True}}}}, r"config.tensors\['y'\]"),
    (CHECK, {"config": CHECK["config"] | {"repeats": None}}, "config.repeats is None"),
]


@pytest.mark.parametrize("good, damage, message", DAMAGES, ids=[str(damage)[:40] for _, damage, _ in DAMAGES])
@pytest.mark.parametrize("command", ["show", "report", "compare"])
def test_a_damaged_row_is_refused_in_one_line_by_whoever_reads_it(command, good, damage, message, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(good) + "\n")
    assert files.read(path)
    path.write_text(json.dumps(good | damage) + "\n")
    assert cli.main([command, *[str(path)] * (1 + (command == "compare"))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: not a file of benchmark rows (row 1: ")
    assert re.search(message, line)


def test_a_check_that_found_nan_can_be_read_again(tmp_path):
    entry = {"ok": False, "worst_ratio": math.nan, "worst_slice": "all"}
    row = CHECK | {"status": "refused", "config": CHECK["config"] | {"tensors": {"y": entry}}}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert files.read(path)[0].status == "refused"


@pytest.mark.parametrize(
    "kind, damage, message",
    [
        ("op", lambda rows: rows[0].update(median_ms=float("nan")), "median_ms is nan"),
        ("op", lambda rows: rows[0].update(median_ms=0.0), "a row that cannot be read"),
        ("op", lambda rows: rows[0].update(samples_ms=5), "a row that cannot be read"),
        ("op", lambda rows: rows.__setitem__(0, 5), "row 1: expected a mapping, got int"),
        ("check", lambda rows: rows[0].update(tensors=5), "a row that cannot be read"),
    ],
)
def test_a_damaged_row_of_the_first_schema_is_refused_in_one_line(kind, damage, message, tmp_path):
    document = record.load(record.RESULTS / f"{kind}-h200-20261124.json")
    damage(document["rows"])
    path = record.write(document, tmp_path / "rows.json")
    with pytest.raises(ValueError, match=message) as caught:
        files.read(path)
    assert "\n" not in str(caught.value)


def test_a_damaged_report_of_gpu_tests_is_refused_in_one_line(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    path.write_text('{"kind": "test-gpu", "rows": [{"test": "t.py::a"}], "schema": 1}')
    assert cli.main(["show", str(path)]) == 2
    assert capsys.readouterr().err == f"error: {path}: row 1: outcome, message must be text\n"


def test_binary_rubbish_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a file of benchmark rows"):
        files.read(path)


def test_unwritable_files_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"must end in .jsonl, .csv, .md"):
        files.Writer([tmp_path / "rows.xlsx"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        files.Writer([tmp_path / "file" / "rows.jsonl"])


def test_the_first_row_replaces_a_file_and_only_it(tmp_path):
    path, link = tmp_path / "rows.jsonl", tmp_path / "latest.jsonl"
    path.write_text("figures of last year\n")
    link.symlink_to(path)
    with files.Writer([link, link]) as writer:
        assert path.read_text() == "figures of last year\n"
        writer.append(ROW)
        assert files.read(path) == [ROW]
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == sorted([path, link])


def test_a_folder_is_no_file_to_write(tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"rows.jsonl: cannot be written"):
        files.Writer([tmp_path / "rows.jsonl"])
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.jsonl"]


def test_committed_files_can_all_be_read():
    found = sorted([*record.RESULTS.glob("*.json"), *record.RESULTS.glob("*.jsonl")])
    assert found
    for path in found:
        if path.suffix == ".json" and record.load(path)["kind"] == "test-gpu":
            continue
        assert files.read(path)


def test_the_first_schema_becomes_rows():
    path = record.RESULTS / "op-h200-20261124.json"
    old = record.load(path)["rows"][0]
    row = files.read(path)[0]
    assert (row.kernel, row.provider, row.mode, row.dtype) == ("op", "triton", "forward", "bfloat16")
    assert row.sizes == (8, 4096, 84, 64, 16)
    assert row.median_ms == old["median_ms"]
    assert min(old["samples_ms"]) <= row.p20_ms <= row.median_ms <= row.p80_ms <= max(old["samples_ms"])
    assert row.device == "NVIDIA H200"
    assert row.git.startswith("98d7d3e")
    (check, *_) = files.read(record.RESULTS / "check-h200-20261124.json")
    assert (check.mode, check.status) == ("check", "ok")
    assert check.config["tensors"]["y"]["ok"]

"""Reads the settings and records of a run from its folder."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcsgd.commands.report.records import Columns, EvaluationRecords, RunRecord, TrainingRecords
from hpcsgd.commands.train.run_folder import DONE
from hpcsgd.errors import HpcsgdError

_STEP = "step"
_BYTES = ("bytes_sent", "bytes_shared", "bytes_saved")
_SECONDS = ("compute_seconds", "wait_seconds", "communication_seconds")
_FINITE = ("epoch", "time", *_SECONDS)
_KINDS: dict[str, type[Columns]] = {"train": TrainingRecords, "test": EvaluationRecords}


def load(path: Path | str) -> RunRecord:
    """Read a run folder: its `config.toml` and `metrics.jsonl`.

    Raises
    ------
    HpcsgdError
        The folder does not exist, is not a run folder, has no records yet, or a file in it is corrupt; the
        message names file and line. A truncated last line, left by a killed run, is not an error but a note.
    """
    folder = Path(path).resolve()
    if not folder.exists():
        raise HpcsgdError(f"no such folder: {path}", do="give the folder of a run of hpcsgd train")
    settings, metrics = folder / "config.toml", folder / "metrics.jsonl"
    for file in (settings, metrics):
        if not file.is_file():
            do = "give the folder that holds config.toml and metrics.jsonl"
            raise HpcsgdError(f"not a run folder: {path} has no {file.name}", do=do)
    text, config = _config(settings)
    rows, notes = _rows(metrics)
    ranks = _ranks(metrics, rows)
    current = {event: _latest(rows, event) for event in _KINDS}
    replaced = len(rows) - sum(map(len, current.values()))
    if replaced:
        notes.append(f"A resumed run recorded steps again: {replaced} of {len(rows)} records are replaced.")
    train = TrainingRecords(**_columns(current["train"], TrainingRecords, ranks))
    test = EvaluationRecords(**_columns(current["test"], EvaluationRecords, ranks))
    if bad := int(np.count_nonzero(~np.isfinite(test.loss))):
        notes.append(f"The test loss is not finite in {bad} of {len(test)} evaluations.")
    run = RunRecord(folder, config, text, ranks, train, test, tuple(notes))
    return replace(run, notes=(*run.notes, *_end_of(run)))


def _end_of(run: RunRecord) -> Iterator[str]:
    if not (run.folder / DONE).exists():
        yield f"The run is under way, or has stopped: its last record is of step {run.last.step[-1]}."
    if not len(run.test):
        yield "The run was never evaluated."


def _config(file: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise HpcsgdError(
            f"{file} is not valid TOML", got=error, do="correct the file, or leave the run out of the report"
        ) from error


@dataclass(frozen=True)
class _Row:
    line: int
    event: str
    values: dict[str, Any]


def _rows(file: Path) -> tuple[list[_Row], list[str]]:
    lines = [pair for pair in enumerate(file.read_bytes().split(b"\n"), 1) if pair[1].strip()]
    rows: list[_Row] = []
    notes: list[str] = []
    for number, line in lines:
        try:
            values = json.loads(line)
        except ValueError as error:
            if number != lines[-1][0]:
                raise _corrupt(file, number, "a JSON object", error) from error
            notes.append(f"Line {number} of {file.name}, the last line, is cut short and ignored.")
            continue
        if not isinstance(values, dict) or not isinstance(values.get("event"), str):
            raise _corrupt(file, number, "a JSON object with the key 'event'", line[:60])
        # Events of other kinds are not part of a report.
        if kind := _KINDS.get(values["event"]):
            for field in fields(kind):
                _check(file, number, field.name, values.get(field.name))
            rows.append(_Row(number, values["event"], values))
    if not rows:
        do = "wait for the first record of the run, or leave the run out of the report"
        raise HpcsgdError(f"{file} holds no record yet", do=do)
    return rows, notes


def _check(file: Path, line: int, name: str, value: object) -> None:
    integer, per_rank = name == _STEP or name in _BYTES, name in _BYTES + _SECONDS
    finite = name in _FINITE
    items = value if per_rank and isinstance(value, list) and value else [value]
    if per_rank == isinstance(value, list) and all(_fits(item, integer, finite) for item in items):
        return
    number = "an integer" if integer else "a finite number" if finite else "a number"
    raise _corrupt(file, line, f"{name!r}: {number}" + " for each rank" * per_rank, value)


def _fits(item: object, integer: bool, finite: bool) -> bool:
    if type(item) is int:
        return abs(item) < 2**63
    return type(item) is float and not integer and (math.isfinite(item) or not finite)


def _corrupt(file: Path, line: int, expected: str, got: object) -> HpcsgdError:
    do = "correct or remove this line"
    return HpcsgdError(f"{file}, line {line} is corrupt", expected=expected, got=repr(got), do=do)


def _ranks(file: Path, rows: list[_Row]) -> int:
    ranks = len(rows[0].values["bytes_sent"])
    for row in rows:
        for name in _BYTES + _SECONDS:
            if len(row.values.get(name, range(ranks))) != ranks:
                raise _corrupt(
                    file,
                    row.line,
                    f"{name!r}: one entry for each of {ranks} ranks",
                    row.values[name],
                )
    return ranks


def _latest(rows: list[_Row], event: str) -> list[_Row]:
    # A run that is killed and resumed from its checkpoint records some steps twice.
    current: list[_Row] = []
    for row in rows:
        step, again = row.values[_STEP], row.event == event
        while current and current[-1].values[_STEP] >= step + (not again):
            current.pop()
        if again:
            current.append(row)
    return current


def _columns(rows: list[_Row], kind: type[Columns], ranks: int) -> dict[str, Any]:
    return {field.name: _column(rows, field.name, ranks) for field in fields(kind)}


def _column(rows: list[_Row], name: str, ranks: int) -> NDArray[Any]:
    dtype = np.int64 if name == _STEP or name in _BYTES else np.float64
    shape = (len(rows), ranks) if name in _BYTES + _SECONDS else (len(rows),)
    return np.array([row.values[name] for row in rows], dtype=dtype).reshape(shape)

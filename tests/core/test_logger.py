"""Logging from several ranks."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from ranks import run_ranks

from nbaccel import Accelerator, get_logger, launch


def test_caller_and_level_are_those_of_the_call(caplog: pytest.LogCaptureFixture) -> None:
    logger = get_logger("test.levels")
    with caplog.at_level(logging.INFO, "test.levels"):
        logger.info("loss %.1f", 0.5)
        logger.debug("unseen")
        for _ in range(3):
            logger.warning_once("only %s", "once")
        logger.warning_once("only %s", "twice")
    assert [(r.levelname, r.getMessage(), r.filename) for r in caplog.records] == [
        ("INFO", "loss 0.5", "test_logger.py"),
        ("WARNING", "only once", "test_logger.py"),
        ("WARNING", "only twice", "test_logger.py"),
    ]
    assert {record.funcName for record in caplog.records} == {"test_caller_and_level_are_those_of_the_call"}


def test_level_is_taken_from_the_argument_and_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger().level
    try:
        assert get_logger("test.argument", log_level="debug").logger.level == logging.DEBUG
        monkeypatch.setenv("ACCELERATE_LOG_LEVEL", "error")
        assert get_logger("test.variable").logger.level == logging.ERROR
    finally:
        logging.getLogger().setLevel(root)


def _speak(path: str) -> None:
    logging.basicConfig(format="%(message)s", filename=path, force=True)
    logger = get_logger("test.ranks", log_level="INFO")
    logger.info("before a group")
    Accelerator(cpu=True)
    for turn in range(3):
        logger.info("turn %d", turn, in_order=True)
    logger.info("main")
    logger.info("all", main_process_only=False)


def test_ranks_speak_one_alone_or_in_order(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "log"
    run_ranks(_speak, str(path))
    lines = path.read_text().splitlines()
    assert lines[0] == "[rank 0] before a group"
    assert lines[1:7] == [f"[rank {rank}] turn {turn}" for turn in range(3) for rank in range(2)]
    assert sorted(lines[7:]) == ["[rank 0] all", "[rank 0] main", "[rank 1] all"]


def _say(path: str) -> None:
    logging.basicConfig(format="%(rank)s|%(message)s", filename=f"{path}{os.environ['RANK']}", force=True)
    logger = get_logger("test.labelled", log_level="INFO")
    logger.info("all", main_process_only=False)
    logger.info("main", extra={"rank": "asked"})


def test_message_when_the_launch_labels_its_ranks_lines_bears_no_second_label(tmp_path: Path) -> None:
    launch(_say, f"{tmp_path}/", num_processes=2, device="cpu", folder=False).result()
    assert (tmp_path / "0").read_text().splitlines() == ["0|all", "asked|main"]
    assert (tmp_path / "1").read_text().splitlines() == ["1|all"]

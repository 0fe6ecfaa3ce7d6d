"""The entry in the process of the test."""

import sys

import pytest
from commands import options

from cap_llm.train import main


@pytest.fixture
def entry(monkeypatch, text_file, tmp_path):
    """Runs the entry in this process; returns the run directory and the exit code."""

    def run(model, *more, out="run"):
        words = options(model, text_file, tmp_path / out, *more)
        monkeypatch.setattr(sys, "argv", ["cap-llm", *words])
        return tmp_path / out, main()

    return run

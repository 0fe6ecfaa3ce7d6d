"""Bad input of every kind is refused in one line that names the value and the remedy, with exit
code 2, no traceback, before long work; and what was finished by then is kept.

Most cases call the entry in process (an import costs seconds); the ones about streams, signals and
ranks are real processes (`test_failures.py`).
"""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from damage import assert_one_line

from cap_llm import train


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch):
    """No hub, and the process as it was: the entry sets a signal handler and a thread count."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # tiny matrices lose time by threads
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def llama(tiny) -> Path:
    """A sound model of two blocks; not to be changed."""
    return tiny("llama")


@pytest.fixture
def broken(llama, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture(scope="session")
def scored(text_file, tmp_path_factory) -> Path:
    """Another text, for `evaluate`."""
    path = tmp_path_factory.mktemp("scored") / "scored.txt"
    path.write_text(" ".join(reversed(text_file.read_text().split()[:2000])))
    return path


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def base(llama, text_file, out) -> list[str]:
    """The options of a small sound run of the stage `oneshot`."""
    return [
        *("--model.path", str(llama), "--output_dir", str(out), "--stages", "[oneshot]"),
        *("--calibration.corpus", str(text_file), "--calibration.sequences", "4"),
        *("--calibration.length", "32"),
        *("--evaluate.window", "32", "--evaluate.max_windows", "4"),
    ]


@pytest.fixture
def call(monkeypatch, capfd):
    """Runs the entry in this process: exit code, stdout, stderr."""

    def run(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cap-llm", *map(str, args)])
        capfd.readouterr()
        code = train.main()
        streams = capfd.readouterr()
        return code, streams.out, streams.err

    return run


@pytest.fixture
def refuse(call, base, out):
    """Runs the entry with `base` and further options, which must be refused: the message."""

    def run(*args, started: bool = False) -> str:
        code, _, err = call(*base, *args)
        assert_one_line(code, err)
        if not started:
            assert not out.exists(), "something was written before the refusal"
        return err.removeprefix("cap-llm: error: ").rstrip("\n")

    return run


@pytest.fixture
def accept(call, base):
    """Runs the entry with `base` and further options, which must work: what it printed."""

    def run(*args) -> str:
        code, said, err = call(*base, *args)
        assert code == 0, err
        return said

    return run

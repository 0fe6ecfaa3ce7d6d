"""How the tests of the stages that go block by block start the entry."""

import subprocess
import sys

from support import ROOT, environment

ALL = "[oneshot, sds, reconstruct]"


def options(model, text_file, folder, *more) -> list[str]:
    words = ["--output_dir", folder, "--model.path", model, "--calibration.corpus", text_file]
    words += ["--calibration.sequences", 20, "--calibration.length", 48]
    words += ["--calibration.held_out", 6, "--runtime.device", "cpu"]
    return [str(w) for w in [*words, *more]]


def run_entry(words: list[str], ranks: int = 1) -> subprocess.CompletedProcess:
    """Runs the entry in processes of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*(launcher if ranks > 1 else []), str(ROOT / "cap_llm/train.py"), *words]
    return subprocess.run(
        [sys.executable, *command], env=environment(), capture_output=True, text=True, check=False
    )

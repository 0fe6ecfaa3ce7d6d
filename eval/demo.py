"""The demo: a real model pruned, reconstructed and recovered, from nothing but Python packages.

    python eval/demo.py [OUTPUT_DIR]          (`make demo` calls it)

Each row of its table is a run of the real entry under the `deepspeed` launcher. Runs that are
finished are not repeated, and one that was stopped goes on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "eval")]

from cap_llm.runtime.console import Console, duration, quiet_libraries  # noqa: E402

quiet_libraries()

import assets  # noqa: E402
import torch  # noqa: E402

from cap_llm.evaluation.report import write_report  # noqa: E402
from cap_llm.evaluation.runs import collect  # noqa: E402

METHODS = {
    "magnitude 50 %": ["--oneshot.method", "magnitude"],
    "Wanda 50 %": ["--oneshot.method", "wanda"],
    "SparseGPT 50 %": [],
    "SparseGPT + refit 50 %": ["--oneshot.refit", "true"],
    "ALPS 50 %": ["--oneshot.method", "alps"],
    "SparseGPT + refit 2:4": ["--oneshot.refit", "true", "--oneshot.pattern", "2:4"],
}
LATER = {  # row -> the row in whose run directory it goes on, its stage
    "SparseGPT 50 % + recovery": ("SparseGPT 50 %", "recover"),
    "ALPS 50 % + reconstruction": ("ALPS 50 %", "reconstruct"),
}


def main() -> int:
    """Runs all rows and writes the report; returns the exit code."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    console = Console()
    start = time.monotonic()
    model = assets.smollm2(console.say)
    calibration, held_out = assets.wikipedia(console.say)
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed warns at every start
    # Two ranks where there are only cores: recovery is data-parallel. One card is enough else.
    cards = torch.cuda.is_available()
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    runs = {"dense": ["--stages", "[evaluate]"], **METHODS}
    for row, (base, stage) in LATER.items():
        runs[row] = [*METHODS[base], "--stages", f"[{stage}, evaluate]"]
    folders = []
    for n, (name, options) in enumerate(runs.items(), 1):
        console.say(f"\n[{n}/{len(runs)}] {name}", style="bold")
        place, stage = LATER.get(name, (name, "oneshot"))
        folder = out / place.lower().replace(" %", "").replace(" + ", "-").replace(" ", "-")
        command = [
            *(launcher if stage == "recover" and not cards else [sys.executable]),
            str(ROOT / "cap_llm/train.py"),
            *("--config", "demo", "--output_dir", str(folder), "--name", name),
            *("--model.path", str(model), "--calibration.corpus", str(calibration)),
            *("--recover.corpus", str(calibration)),
            *("--evaluate.corpora", f"[{held_out}]", *options),
        ]
        code = subprocess.run(command, env=environment, check=False).returncode
        if code:
            console.say(f"{name} ended with exit code {code}")
            return code
        folders.append(folder)
    console.say("")
    title = f"{assets.MODEL_NAME}, held-out Wikipedia articles"
    results = [r for folder in dict.fromkeys(folders) for r in collect(folder)]
    page = write_report(results, out, title, console)
    console.say(f"all of it in {duration(time.monotonic() - start)}; report: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

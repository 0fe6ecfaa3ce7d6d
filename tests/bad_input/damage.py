"""What is done to sound models, and what is asked of a refusal."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

DOWN_0, DOWN_1 = (f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1))
UP_0, UP_1 = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))


def assert_one_line(code: int, err: str) -> None:
    assert code == 2, err
    assert err.count("\n") == 1 and err.endswith("\n"), err
    assert err.startswith("cap-llm: error: "), err
    assert "Traceback" not in err


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def finished_blocks(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "oneshot" / "blocks").glob("*.json"))


def leftovers(out: Path) -> list[str]:
    return [str(p) for p in out.rglob("*") if p.name.endswith(".tmp") or "scratch" in p.name]

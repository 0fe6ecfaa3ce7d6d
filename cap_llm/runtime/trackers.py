"""TensorBoard and Weights & Biases, for those who want their curves there as well."""

from __future__ import annotations

import importlib.util
import uuid
from pathlib import Path

from cap_llm.runtime.errors import UserError


class TensorBoard:
    """Writes events to `<run>/tensorboard`."""

    def __init__(self, folder: Path):
        require("tensorboard", "recover.log.tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        """One point of each curve."""
        for name, value in values.items():
            self._writer.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        """Writes what is pending."""
        self._writer.close()


class Wandb:
    """Logs to a project of Weights & Biases; `WANDB_MODE=offline` keeps it on this machine."""

    def __init__(self, folder: Path, project: str, title: str, settings: dict):
        require("wandb", "recover.log.wandb")
        import wandb

        self._stages: set[str] = set()
        own_id = folder / "wandb_id"  # a repeated command goes on with its own curves
        if not own_id.exists():
            own_id.write_text(uuid.uuid4().hex, encoding="utf-8")
        try:
            self._run = wandb.init(
                project=project,
                name=title,
                dir=str(folder),
                config=settings,
                resume="allow",
                settings=wandb.Settings(silent=True, console="off"),  # the run has its own log
                id=own_id.read_text(encoding="utf-8"),
            )
        except Exception as error:  # no key, no network, no such project
            raise UserError(
                f"recover.log.wandb {project}: {type(error).__name__} "
                f"{' '.join(str(error).split())}. "
                "Run `wandb login` first, or set WANDB_MODE=offline."
            ) from None

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        """One point of each curve, over the steps of its stage."""
        if stage not in self._stages:
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        self._run.log({f"{stage}/{k}": v for k, v in values.items()} | {f"{stage}/step": step})

    def close(self) -> None:
        """Sends what is pending."""
        self._run.finish()


def require(package: str, option: str) -> None:
    """Raises:
    UserError: the package is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{option} needs the package {package}: pip install {package}")

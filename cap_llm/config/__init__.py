"""The settings of a run, one dataclass per section.

A YAML file (a recipe) is the source of truth; `--section.field VALUE` overrides it. Defaults, help
texts and the option table of the documentation come from these classes. A field's type holds its
range; rules across fields are in `__post_init__`. Nothing here imports torch or reads the disk.
"""

from cap_llm.config.blockwise import (
    CalibrationConfig,
    OneshotConfig,
    OwlConfig,
    ReconstructConfig,
    SdsConfig,
)
from cap_llm.config.evaluate import EvaluateConfig
from cap_llm.config.model import ModelConfig, RuntimeConfig
from cap_llm.config.recover import (
    CheckpointConfig,
    ContrastConfig,
    EngineConfig,
    Level,
    LogConfig,
    MasksConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RecoverConfig,
)
from cap_llm.config.run import STAGE_NAMES, Config

__all__ = [
    "STAGE_NAMES",
    "CalibrationConfig",
    "CheckpointConfig",
    "Config",
    "ContrastConfig",
    "EngineConfig",
    "EvaluateConfig",
    "Level",
    "LogConfig",
    "MasksConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OneshotConfig",
    "OptimizerConfig",
    "OwlConfig",
    "ReconstructConfig",
    "RecoverConfig",
    "RuntimeConfig",
    "SdsConfig",
]

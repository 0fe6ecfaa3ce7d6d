"""A model directory, opened once and handed on."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from cap_llm.models import files
from cap_llm.models.checkpoint import Checkpoint, prefix_of_bin
from cap_llm.models.mask_file import FILE as MASKS
from cap_llm.models.mask_file import OLD_FILE as OLD_MASKS
from cap_llm.models.mask_file import MaskFile
from cap_llm.models.masks import Masks
from cap_llm.models.skeleton import (
    as_matrix,
    find_blocks,
    linears,
    match_names,
    missing_names,
    stored_names,
)
from cap_llm.runtime.errors import UserError, one_line
from cap_llm.runtime.files import read_json, write_json
from cap_llm.runtime.world import World

SPARSITY = "sparsity.json"
# Options of `from_pretrained`. By default transformers asks on a terminal whether to run a
# directory's own code (and takes SIGALRM for that), and looks for missing files on the hub.
FROM_DIRECTORY = {"trust_remote_code": False, "local_files_only": True}


@dataclass
class Row:
    """What happened to one matrix; a row of `sparsity.json`.

    Attributes:
        name: of the weight in the model.
        shape: [R, C].
        pattern: of the mask; `as found` if cap_llm did not choose it.
        zeros: number of zero weights.
        masked: number of weights that the mask removes; an unmasked weight may be zero too.
        error: squared error of the outputs on the calibration text, relative to the outputs. A
            method without a Hessian (Wanda) measures it on 16 sequences. None for a method that
            reads no text, and for reconstruction, which measures the errors of blocks.
        damping: of the Hessian, relative to its mean diagonal; None without one.
        seconds: time of the solver; for reconstruction, an equal share of the block's time.
        kept: the selected one of several candidates.
    """

    name: str
    shape: list[int]
    pattern: str
    zeros: int
    masked: int
    error: float | None = None
    damping: float | None = None
    seconds: float = 0.0
    kept: str | None = None

    @property
    def sparsity(self) -> float:
        """The share of the matrix that its mask removes."""
        return self.masked / math.prod(self.shape)

    @property
    def kind(self) -> str:
        """The place in the block: `mlp.up_proj` for `model.layers.3.mlp.up_proj.weight`."""
        return re.sub(r"^.*?\.\d+\.", "", self.name).removesuffix(".weight")


@dataclass(frozen=True)
class ModelDirectory:
    """A model directory whose files are read when they are first needed, and only once.

    So open a directory after it has been written. Do not change what its properties return: `build`
    makes a new skeleton. A directory with config.json alone has a skeleton, but no checkpoint.

    Attributes:
        path: the folder, or a `.gguf` file that is not converted yet.

    Raises:
        UserError: by a property: a file is missing or damaged, or the model is not supported.
    """

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def settings(self) -> dict:
        """The content of config.json, merged with its `text_config` if multimodal."""
        content = files.config_dict(self.path)
        text_config = content.get("text_config")
        return content | text_config if isinstance(text_config, dict) else content

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config as transformers reads it, without storage settings."""
        content = files.config_dict(self.path)
        kind, code = content.get("model_type"), content.get("auto_map")
        if code and str(kind) not in CONFIG_MAPPING:
            raise UserError(
                f"{self}: transformers {transformers.__version__} does not support model_type "
                f"{kind!r}, and cap_llm never runs a model's own Python code (auto_map in "
                "config.json)"
            )
        try:
            config = AutoConfig.from_pretrained(self.path, **FROM_DIRECTORY)
        except Exception as error:  # KeyError, ValueError, OSError, by cause
            raise self._unreadable(error) from None
        for part in (config, config.get_text_config()):  # two if multimodal
            for name in files.STORAGE[:-1]:
                if hasattr(part, name):
                    delattr(part, name)
            kernel = part._attn_implementation
            if isinstance(kernel, str) and "/" in kernel:
                raise UserError(
                    f"{self}/config.json sets attn_implementation to {kernel}, code from the hub "
                    'that cap_llm never runs. Set it to "sdpa".'
                )
        return config

    @cached_property
    def has_safetensors(self) -> bool:
        """Whether the weights can be streamed; if not, they must be converted."""
        return files.can_be_streamed(self.path)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The tensors in the files."""
        return Checkpoint(self.path)

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model with its parameters on the meta device and its buffers computed.

        Its class is the one that config.json names, or the base model's if the files lack only the
        head, as those of sentence encoders do.
        """
        model = self._build(self._named_class, None)
        if not self.has_safetensors or model.base_model is model:
            return model
        head = model.base_model_prefix + "."
        missing = missing_names(model, stored_names(model, self.checkpoint))
        if not missing or any(name.startswith(head) for name in missing):
            return model
        body = self._build(type(model.base_model), None)
        return model if missing_names(body, stored_names(body, self.checkpoint)) else body

    def build(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """A new skeleton that may be changed, of `dtype` or of the type in config.json."""
        return self._build(type(self.skeleton), dtype)

    def _build(self, kind: type, dtype: torch.dtype | None) -> PreTrainedModel:
        config = copy.deepcopy(self.config)  # transformers changes it
        try:
            with init_empty_weights(include_buffers=False), no_init_weights():
                return kind._from_config(config, dtype=dtype or config.dtype)
        except Exception as error:  # any type: the values go straight into the model's own code
            raise self._unreadable(error) from None

    @property
    def _named_class(self) -> Any:
        for name in self.config.architectures or []:
            if hasattr(transformers, name):
                return getattr(transformers, name)
        try:
            return AutoModelForCausalLM._model_mapping[type(self.config)]
        except KeyError:
            raise UserError(f"{self} ({self.config.model_type}) is not a language model") from None

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(
            f"{self}/config.json: transformers {transformers.__version__} cannot read it: "
            f"{one_line(error)}"
        )

    @cached_property
    def prefix(self) -> str:
        """The prefix that torch.compile or data parallel added to all names in the files."""
        return self.checkpoint.prefix if self.has_safetensors else prefix_of_bin(self.path)

    @property
    def loading_options(self) -> dict:
        """The options that make `from_pretrained` read the directory as `skeleton` does."""
        renaming = {"key_mapping": {f"^{re.escape(self.prefix)}": ""}} if self.prefix else {}
        return {"config": copy.deepcopy(self.config)} | renaming | FROM_DIRECTORY

    @property
    def notice(self) -> str:
        """A sentence about how the model differs from what the files say, or an empty string."""
        parts = []
        if self.prefix:
            parts.append(f"removing the prefix {self.prefix} from tensor names")
        if type(self.skeleton) is not self._named_class:
            parts.append(
                f"loading it as {type(self.skeleton).__name__}, because the files lack the head of "
                f"{self._named_class.__name__}"
            )
        return f"model {self}: {'; '.join(parts)}" if parts else ""

    @cached_property
    def keys(self) -> dict[str, str]:
        """The names in the files of the parameters and persistent buffers, by name in the model."""
        return match_names(self.skeleton, self.checkpoint)

    @cached_property
    def linears(self) -> dict[str, nn.Module]:
        """The linears in the blocks, without weights, by the names of their weights."""
        prefix, blocks = find_blocks(self.skeleton)
        return {f"{prefix}.{name}.weight": linear for name, linear in linears(blocks).items()}

    def matrix(self, name: str) -> torch.Tensor:
        """The stored weight [R, C] of a linear."""
        (weight,) = self.checkpoint.read([self.keys[name]]).values()
        return as_matrix(self.linears[name], weight)

    @cached_property
    def mask_file(self) -> MaskFile | None:
        """The mask file, if there is one."""
        return MaskFile(self.mask_path) if self.mask_path else None

    @property
    def mask_path(self) -> Path | None:
        """Path of the mask file, if there is one."""
        paths = (self.path / name for name in (MASKS, OLD_MASKS))
        return next((path for path in paths if path.exists()), None)

    def masks(self, world: World) -> Masks:
        """The masks, from the mask file or from zeros. All ranks call it together."""
        if "_masks" not in self.__dict__:
            self.__dict__["_masks"] = Masks(self, world)
        return self.__dict__["_masks"]

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of `sparsity.json`, one per pruned weight; empty without the file."""
        path = self.path / SPARSITY
        if not path.exists():
            return []
        return read_json(path, lambda content: [Row(**row) for row in content["rows"]])

    @cached_property
    def fingerprint(self) -> str | None:
        """A checksum of about 64 samples of each shard, None without weights."""
        return files.fingerprint(self.path)

    @cached_property
    def weights_digest(self) -> str:
        """A checksum of all weights, which ties scores to them."""
        return files.weights_digest(self.path)

    def verify(self, rows: list[Row]) -> tuple[int, int]:
        """Reads all weights and checks them against the masks and the skeleton.

        Args:
            rows: one per pruned weight, as written.

        Returns:
            Zeros and weights of the whole model, without buffers.

        Raises:
            UserError: a masked weight is not zero, or a count differs.
        """
        row_of = {self.keys[row.name]: row for row in rows}
        parameters = dict(self.skeleton.named_parameters())
        n_zeros = n_weights = 0
        for key in {key for name, key in self.keys.items() if name in parameters}:
            (tensor,) = self.checkpoint.read([key]).values()
            zeros = int((tensor == 0).sum())
            n_zeros += zeros
            n_weights += tensor.numel()
            if not (row := row_of.get(key)):
                continue
            masks = self.mask_file or MaskFile(self.path / MASKS)
            mask = as_matrix(self.linears[row.name], masks.read(row.name))
            if zeros != row.zeros or bool((tensor[~mask] != 0).any()):
                raise UserError(
                    f"{row.name} in {self} has {zeros} zeros, but {row.zeros} were written (file "
                    "changed or disk error). Delete the folder and rerun."
                )
        return n_zeros, n_weights

    def write_sparsity(
        self,
        model: str,
        rows: list[Row],
        whole: tuple[int, int],
        blocks: list[dict] | None = None,
    ) -> tuple[int, int]:
        """Writes `sparsity.json`.

        Args:
            model: name of the model that was pruned.
            rows: one per pruned weight.
            whole: zeros and weights of the whole model, as `verify` counts them.
            blocks: errors of whole blocks.

        Returns:
            Zeros and weights of the pruned matrices.
        """
        zeros, weights = sum(r.zeros for r in rows), sum(math.prod(r.shape) for r in rows)
        write_json(
            self.path / SPARSITY,
            {
                "model": model,
                "rows": [asdict(r) for r in rows],
                **({"blocks": blocks} if blocks else {}),
                "pruned_matrices": {"count": len(rows), **_counts(zeros, weights)},
                "whole_model": _counts(*whole),
            },
        )
        return zeros, weights


def _counts(zeros: int, weights: int) -> dict:
    return {"weights": weights, "zeros": zeros, "sparsity": zeros / max(1, weights)}

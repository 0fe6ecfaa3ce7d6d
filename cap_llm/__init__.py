"""cap_llm prunes transformer language models and recovers their quality.

    from cap_llm import contrastive_loss, keep_zeros, masks_of_zeros, perplexity, prune

These names load on first use, so `import cap_llm` does not import torch. Import everything else
from its module, such as `cap_llm.config` or `cap_llm.solvers.sparsegpt`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cap_llm.blockwise.perplexity import perplexity
    from cap_llm.blockwise.prune import prune
    from cap_llm.contrast.loss import contrastive_loss
    from cap_llm.sparsity.keeper import keep_zeros, masks_of_zeros

__version__ = "0.2.0"
__all__ = ["contrastive_loss", "keep_zeros", "masks_of_zeros", "perplexity", "prune"]

_MODULES = {
    "contrastive_loss": "cap_llm.contrast.loss",
    "keep_zeros": "cap_llm.sparsity.keeper",
    "masks_of_zeros": "cap_llm.sparsity.keeper",
    "perplexity": "cap_llm.blockwise.perplexity",
    "prune": "cap_llm.blockwise.prune",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""cap_llm prunes transformer language models and trains the lost quality back.

The parts, each importable on its own:

* `cap_llm.solvers`: what to do with one weight matrix;
* `cap_llm.blockwise`: the walk that applies a solver block by block, streaming;
* `cap_llm.models`: a Hugging Face model seen as embedding, blocks and head;
* `cap_llm.train`: the command (`cap-llm`, `deepspeed cap_llm/train.py`).
"""

__version__ = "0.1.0"

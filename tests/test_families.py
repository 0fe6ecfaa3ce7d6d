"""Some of the families that `eval/families.py` tries, of each kind that blocks come in."""

import families
import pytest
import transformers

STATES = {
    "Phi3ForCausalLM": families.WORKS,  # q, k and v in one matrix, gate and up in another
    "FalconForCausalLM": families.WORKS,  # attention and MLP side by side
    "MiniCPM3ForCausalLM": families.WORKS,  # latent attention
    "Gemma3ForConditionalGeneration": families.WORKS,  # it also sees: two lists of blocks
    "Qwen3MoeForCausalLM": families.REJECTED,
    "MambaForCausalLM": families.REJECTED,
}


@pytest.mark.parametrize("name, state", STATES.items(), ids=STATES)
def test_a_family_works_or_is_refused_by_a_message(name, state):
    found, how = families.attempt(getattr(transformers, name))
    assert found == state, how
    assert state == families.WORKS or "linear layer" in how

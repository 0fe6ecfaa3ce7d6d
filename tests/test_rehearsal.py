"""What a model's own code cannot take is refused before the work, by the option's name."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers

from cap_llm.models.blocks import BlockModel
from cap_llm.models.directory import ModelDirectory
from cap_llm.models.rehearsal import SCORES, Rehearsal, check_lengths
from cap_llm.runtime.errors import UserError, as_user_error

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mpt(tmp_path_factory):
    """A model whose table ends at 64 tokens, under a setting that only its own code knows."""
    config = transformers.MptConfig(
        d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=64, vocab_size=512
    )
    folder = tmp_path_factory.mktemp("mpt")
    transformers.MptForCausalLM(config).save_pretrained(folder)
    return ModelDirectory(folder)


@pytest.mark.parametrize("option", ["calibration.length", "evaluate.window", "recover.length"])
@pytest.mark.parametrize("walked", [True, False])
def test_a_table_under_another_name_is_refused_with_the_longest(mpt, option, walked):
    with pytest.raises(UserError) as refused:
        check_lengths(mpt, {option: 100}, "the model", CPU, torch.float32, walked)
    assert f"{option} is 100" in str(refused.value)
    assert f"--{option} 64 or less" in str(refused.value)
    check_lengths(mpt, {option: 64}, "the model", CPU, torch.float32, walked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["opt", "opt350", "llama", "gemma2", "neox", "bloom", "bert"])
def test_what_works_is_not_refused(tiny, family, dtype):
    asked = {"calibration.length": 200, "evaluate.window": 256}
    check_lengths(ModelDirectory(tiny(family, dtype=dtype)), asked, "the model", CPU, torch.float32)
    check_lengths(
        ModelDirectory(tiny(family)), {"recover.length": 256}, "the model", CPU, dtype, walked=False
    )


def test_it_fails_where_the_model_itself_fails(mpt):
    model = BlockModel.open(mpt, CPU)
    for length in (64, 65):
        hidden, calls = None, None
        try:
            with torch.no_grad():
                hidden, calls = model.embed(torch.zeros(1, length, dtype=torch.long))
                with model.block(0) as block:
                    calls[0].run(block, hidden)
            fails = False
        except UserError:
            raise
        except Exception:
            fails = True
        assert bool(Rehearsal(mpt, CPU, torch.float32).failure(length)) == fails == (length > 64)


def test_a_model_without_memory_for_its_weights_is_rehearsed(tmp_path):
    transformers.LlamaConfig(
        **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 2},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256},
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    stage = Rehearsal(ModelDirectory(tmp_path), CPU, torch.float32)
    assert stage.failure(16) is None
    assert stage._max_length**2 * 64 <= SCORES


def test_a_model_that_cannot_be_walked_passes_as_a_teacher(tmp_path):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_local_experts": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    transformers.MixtralConfig(
        vocab_size=512, **small, **heads, architectures=["MixtralForCausalLM"]
    ).save_pretrained(tmp_path)
    asked, model = {"recover.length": 64}, ModelDirectory(tmp_path)
    check_lengths(model, asked, "recover.teacher", CPU, torch.float32, walked=False)
    with pytest.raises(UserError, match="fused experts"):
        check_lengths(model, asked, "the model", CPU, torch.float32)


def failure_of(call) -> BaseException:
    try:
        call()
    except Exception as error:
        return as_user_error(error)
    raise AssertionError("it did not fail")


def test_a_later_failure_of_the_models_own_code_is_one_line(tiny):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("gpt2"))
    error = failure_of(lambda: model(input_ids=torch.zeros(1, 257, dtype=torch.long)))
    assert isinstance(error, UserError)
    assert "\n" not in str(error)
    assert "transformers.models.gpt2.modeling_gpt2" in str(error) and "index out of" in str(error)


def test_other_failures_keep_their_traceback(tiny):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("gpt2"))
    with torch.no_grad():
        model.transformer.h[0].mlp.register_forward_hook(lambda *_: 1 / 0)  # ours
        ours = failure_of(lambda: model(input_ids=torch.zeros(1, 8, dtype=torch.long)))
    assert isinstance(ours, ZeroDivisionError)
    assert isinstance(failure_of(lambda: torch.zeros(2) @ torch.zeros(3)), RuntimeError)
    full = torch.OutOfMemoryError("CUDA out of memory")

    assert as_user_error(full) is full


def test_libraries_cannot_ask(monkeypatch, capsys):
    """They ask where stdin is a terminal, and a job that has one would wait for an answer."""
    from cap_llm.train import guarded

    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self, *_) -> str:
            raise AssertionError("asked")

    monkeypatch.setattr(sys, "stdin", Terminal())

    def work(console) -> None:
        assert not sys.stdin.isatty()
        with pytest.raises(EOFError):
            input("[y/N]")

    assert guarded(work, "test") == 0

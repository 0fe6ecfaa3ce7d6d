"""The stage `sds` through the real entry: what it sees, what it keeps, which starts it takes."""

import pytest
import torch
import transformers
from support import weights

from cap_llm.blockwise import sds as sds_module
from cap_llm.models.mask_file import FILE, MaskFile
from cap_llm.runtime.files import read_json


@pytest.fixture
def watched(monkeypatch) -> tuple[dict, dict, list]:
    """By name: second moments that re-densification sees, weights that it gives; and the text."""
    seen, free, ids = {}, {}, []
    redensify = sds_module._Step._redensify

    def watch(step, names, prefix, sparse, target, batches):
        seen[f"{prefix}{names[0]}.weight"] = batches[0].hessian.clone()
        made = redensify(step, names, prefix, sparse, target, batches)
        free.update({f"{prefix}{n}.weight": w.clone() for n, w in made.items()})
        ids[:] = step.redensify_walk.ids
        return made

    monkeypatch.setattr(sds_module._Step, "_redensify", watch)
    return seen, free, ids


@pytest.mark.parametrize("data", ["dense", "sparse", "redense"])
def test_redensification_sees_the_activations_that_are_asked_for(tiny, entry, watched, data):
    dense = tiny("llama")
    folder, code = entry(dense, "--stages", "[oneshot, sds]", "--sds.data", data)
    assert code == 0
    seen, free, ids = watched
    source = dense if data == "dense" else folder / "oneshot"
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    for name, weight in free.items() if data == "redense" else ():
        model.get_parameter(name).data.copy_(weight)
    name = "model.layers.1.self_attn.q_proj"
    inputs = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(torch.cat(ids))
    x = inputs[0].flatten(0, 1)
    torch.testing.assert_close(seen[f"{name}.weight"], x.T @ x / len(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spoilt, kept", [("the adjustment", "again"), ("both", "first")])
def test_a_matrix_takes_what_has_the_least_error(tiny, entry, monkeypatch, spoilt, kept):
    monkeypatch.setattr(sds_module.Solver, "refit", lambda solver, w, *_: torch.zeros_like(w))
    if spoilt == "both":
        noise = torch.Generator().manual_seed(0)
        monkeypatch.setattr(
            sds_module, "redensify", lambda w, *_: torch.randn(w.shape, generator=noise)
        )
    folder, code = entry(tiny("llama"), "--stages", "[oneshot, sds]", "--sds.l1", 0)
    assert code == 0
    found = [row["kept"] for row in read_json(folder / "sds" / "sparsity.json")["rows"]]
    assert found.count(kept) > len(found) / 2 and "adjusted" not in found
    if kept == "first":
        assert set(found) == {"first"}


def test_sds_without_regularisers_or_adjustment_is_its_base(tiny, entry, watched):
    """Re-densified to the dense weights, the second prune is the first one."""
    dense, (_, free, _) = tiny("llama"), watched
    folder, code = entry(
        dense,
        *("--stages", "[oneshot, sds]", "--calibration.held_out", 0, "--sds.adjust", "false"),
        *("--sds.mu", 0, "--sds.l1", 0, "--sds.l2", 0),
    )
    assert code == 0
    for name, weight in weights(dense).items():
        if name in free:
            assert (free[name] - weight).norm() <= 2e-3 * weight.norm()
    assert len(free) == 14
    first, second = (MaskFile(folder / s / FILE) for s in ("oneshot", "sds"))
    same = [(first.read(n) == second.read(n)).float().mean().item() for n in first.columns]
    assert min(same) > 0.99
    a, b = weights(folder / "oneshot"), weights(folder / "sds")
    assert all((a[k] - b[k]).norm() <= 0.05 * a[k].norm() for k in a)


def test_sds_never_has_more_error_on_held_out_text_than_its_start(tiny, entry):
    folder, code = entry(tiny("llama"), "--stages", "[oneshot, sds]", "--oneshot.method", "wanda")
    assert code == 0
    before, after = (
        {r["name"]: r["error"] for r in read_json(folder / s / "sparsity.json")["rows"]}
        for s in ("oneshot", "sds")
    )
    assert all(after[n] < 1.02 * before[n] for n in before)
    assert sum(after.values()) < 0.8 * sum(before.values())


def test_sds_starts_from_a_model_of_another_format_that_was_pruned_elsewhere(tiny, entry, tmp_path):
    dense = tiny("llama")
    first, _ = entry(dense, "--stages", "[oneshot]", out="first")
    pruned = first / "oneshot"
    torch.save(weights(pruned), pruned / "pytorch_model.bin")
    for path in [*pruned.glob("*.safetensors*"), pruned / "sparsity.json"]:
        path.unlink()
    folder, code = entry(pruned, "--stages", "[sds]", "--model.dense", dense, out="second")
    assert code == 0
    for row in read_json(folder / "sds" / "sparsity.json")["rows"]:
        assert row["masked"] == pytest.approx(0.5 * row["shape"][0] * row["shape"][1], abs=1)


@pytest.mark.parametrize("pattern", ["1:4", "2:8"])
def test_sds_takes_any_pattern_of_a_model_that_was_pruned_elsewhere(tiny, entry, pattern):
    dense = tiny("llama")
    asked = ("--oneshot.pattern", pattern)
    first, _ = entry(dense, "--stages", "[oneshot]", *asked, out="first")
    for name in (FILE, "sparsity.json"):
        (first / "oneshot" / name).unlink()
    start = ("--stages", "[sds]", "--model.dense", dense)
    folder, code = entry(first / "oneshot", *start, *asked, out="second")
    assert code == 0
    for row in read_json(folder / "sds" / "sparsity.json")["rows"]:
        assert row["masked"] == 0.75 * row["shape"][0] * row["shape"][1]


@pytest.mark.parametrize(
    "made, asked, words",
    [
        (["--oneshot.pattern", "2:4"], [], ["--oneshot.pattern 2:4"]),
        (
            ["--oneshot.pattern", "1:4"],
            ["--oneshot.pattern", "2:4"],
            ["--oneshot.pattern 1:4"],
        ),
        (
            [],
            ["--oneshot.pattern", "2:4"],
            ["--oneshot.pattern unstructured"],
        ),
        ([], ["--oneshot.sparsity", "0.7"], ["50.0%", "--oneshot.sparsity 0.5"]),
    ],
)
def test_sds_does_not_change_what_a_model_was_pruned_to_elsewhere(
    tiny, entry, capsys, made, asked, words
):
    dense = tiny("llama")
    folder, code = entry(dense, "--stages", "[oneshot]", *made, out="first")
    assert code == 0
    pruned = folder / "oneshot"
    (pruned / FILE).unlink()
    (pruned / "sparsity.json").unlink()
    capsys.readouterr()
    more = ("--stages", "[sds]", "--model.dense", dense)
    assert entry(pruned, *more, *asked, out="second")[1] == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert entry(pruned, *more, *made, out="second")[1] == 0


def test_sds_on_wanda_keeps_wandas_budget_by_row(tiny, entry):
    folder, code = entry(
        tiny("llama"), "--stages", "[oneshot, sds]", "--oneshot.method", "wanda", "--sds.redensify",
        "false", "--calibration.held_out", 0,
    )  # fmt: skip
    assert code == 0
    masks = MaskFile(folder / "sds" / FILE)
    for name in masks.columns:
        kept = masks.read(name).sum(1)
        assert kept.min() == kept.max()


@pytest.mark.parametrize(
    "pruned_to, asked, words",
    [
        (["--oneshot.pattern", "2:4"], [], ["--oneshot.pattern 2:4"]),
        ([], ["--oneshot.pattern", "2:4"], ["--oneshot.pattern unstructured"]),
        (["--oneshot.sparsity", "0.3"], [], ["30.0%", "--oneshot.sparsity 0.3"]),
    ],
)
def test_sds_refuses_to_prune_again_to_another_pattern(
    tiny, entry, capsys, pruned_to, asked, words
):
    dense = tiny("llama")
    folder, _ = entry(dense, "--stages", "[oneshot]", *pruned_to, out="first")
    start = ("--stages", "[sds]", "--model.dense", dense)
    capsys.readouterr()
    again, code = entry(folder / "oneshot", *start, *asked, out="second")
    assert code == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert not list(again.glob("sds/*"))
    _, code = entry(folder / "oneshot", *start, *pruned_to, out="second")  # the remedy it names
    assert code == 0


@pytest.mark.parametrize(
    "pruned_to, asked",
    [
        (["--oneshot.pattern", "row"], []),  # Wanda's unstructured is by row, too
        (["--oneshot.layers", '{"*.down_proj": 0.25, "*.q_proj": 0}'], []),
        (["--oneshot.sparsity", "0.3333"], ["--oneshot.sparsity", "0.333"]),
    ],
)
def test_sds_takes_a_start_of_its_own_pattern_and_any_uneven_budget(tiny, entry, pruned_to, asked):
    dense, wanda = tiny("llama"), ("--oneshot.method", "wanda")
    first, _ = entry(dense, "--stages", "[oneshot]", *wanda, *pruned_to, out="first")
    start = ("--stages", "[sds]", "--model.dense", dense, *wanda)
    second, code = entry(first / "oneshot", *start, *asked, out="second")
    assert code == 0
    before, after = (
        {r["name"]: r["masked"] for r in read_json(place / "sparsity.json")["rows"]}
        for place in (first / "oneshot", second / "sds")
    )
    assert before == after


def test_sds_stays_inside_an_earlier_mask(tiny, entry):
    """The dense model of the second run is itself pruned, as on a schedule."""
    earlier, _ = entry(tiny("llama"), "--stages", "[oneshot]", "--oneshot.sparsity", 0.3, out="a")
    more = ("--stages", "[oneshot, sds]", "--oneshot.sparsity", 0.6)
    folder, code = entry(earlier / "oneshot", *more, out="b")
    assert code == 0
    files = [MaskFile(f / FILE) for f in (earlier / "oneshot", folder / "sds")]
    stored, kept = weights(folder / "sds"), read_json(folder / "sds" / "sparsity.json")["rows"]
    assert {row["kept"] for row in kept} - {"first"}
    for name in files[0].columns:
        allowed, mask = (file.read(name) for file in files)
        assert not (mask & ~allowed).any() and not stored[name][~mask].any()
        assert int((~mask).sum()) == round(0.6 * mask.numel())

"""Zero-shot scores: lm-eval's own prompts on local rows, its own figures on any number of ranks."""

from __future__ import annotations

import gzip
import json
import math
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ROOT, environment

pytest.importorskip("lm_eval")

from cap_llm import train
from cap_llm.config import EvaluateConfig
from cap_llm.evaluation import lm_eval_tasks as tasks_module
from cap_llm.evaluation import zeroshot
from cap_llm.evaluation.lm_eval_tasks import find_tasks
from cap_llm.evaluation.scores import Score, ScoreFile, read_scores
from cap_llm.models.directory import ModelDirectory
from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.world import World

COLOURS = ["red", "blue", "green", "grey", "white"]


def question(i: int) -> dict:
    texts = [f"{COLOURS[(i + k) % 5]} paint" for k in range(4)]
    return {"choices": {"text": texts, "label": list("ABCD")}, "answerKey": "ABCD"[i % 4]}


# a row of each task in the layout that the tests' folder of data has
LOCAL = {
    "arc_easy": lambda i: {"id": f"q{i}", "question": f"What dries after {i} hours?"} | question(i),
    "arc_challenge": lambda i: {"id": f"c{i}", "question": f"Which of {i} fades?"} | question(i),
    "openbookqa": lambda i: (
        {"id": f"{i}", "question_stem": f"A wall of {i} metres is"} | question(i)
    ),
    "piqa": lambda i: {
        "goal": f"Paint wall {i}.",
        "sol1": f"Use brush {i}.",
        "sol2": "Use a spoon and wait.",
        "label": i % 2,
    },
    "boolq": lambda i: {
        "question": f"is wall {i} dry",
        "passage": f"Wall {i} was painted today. " * (i + 1),
        "answer": i % 3 == 0,
    },
    "rte": lambda i: {
        "sentence1": f"Wall {i} is {COLOURS[i % 5]}.",
        "sentence2": f"Wall {i} has a colour.",
        "label": i % 2,
        "idx": i,
    },
    "copa": lambda i: {
        "premise": f"The bucket fell {i} times.",
        "choice1": "The floor got wet.",
        "choice2": "The roof got dry.",
        "question": "effect" if i % 2 else "cause",
        "idx": i,
        "label": i % 2,
    },
    "hellaswag": lambda i: {
        "ind": i,
        "query": f"Painting: A man opens bucket {i}. He",
        "choices": [f"stirs it {i} times.", "eats it.", "sings to the wall.", "is a wall."],
        "gold": i % 4,
    },
    "lambada_openai": lambda i: {
        "text": f"She stirred bucket {i} and painted the {COLOURS[i % 5]}"
    },
}
FILES = {
    "arc_easy": "arc_easy_test.jsonl",
    "arc_challenge": "arc_challenge_test.jsonl",
    "openbookqa": "openbookqa_test.jsonl",
    "piqa": "piqa_validation.jsonl",
    "boolq": "boolq_validation.jsonl",
    "rte": "rte_validation.jsonl",
    "copa": "copa_validation.jsonl",
    "hellaswag": "hellaswag_val_1000.jsonl",
    "lambada_openai": "lambada_openai.jsonl",
}
WIKI = [" ", " = Paint = ", " ", " Paint is a liquid , and it dries . ", " ", " = = Use = = ", " "]
WIKI += [" Walls are painted @-@ often twice . ", " ", " = Wall = ", " ", " A wall stands . ", " "]
GENERATE = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answerKey}}}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    """A folder of local data, 12 rows a task; not to be changed."""
    folder = tmp_path_factory.mktemp("zeroshot")
    for task, row in LOCAL.items():
        write_rows(folder / FILES[task], [row(i) for i in range(12)])
    (folder / "wiki.test.raw").write_text("\n".join(WIKI))
    (folder / "colours.yaml").write_text(GENERATE.format(file=folder / "arc_easy_test.jsonl"))
    return folder


@pytest.fixture
def own_rows(rows, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(rows, tmp_path / "data"))


@pytest.fixture(scope="session")
def raw_rows(rows, tmp_path_factory) -> Path:
    """The same data where BoolQ and HellaSwag have the hub's own fields."""
    folder = Path(shutil.copytree(rows, tmp_path_factory.mktemp("raw") / "data"))
    (folder / FILES["hellaswag"]).unlink()
    boolq, hellaswag = ([LOCAL[task](i) for i in range(12)] for task in ("boolq", "hellaswag"))
    for row in boolq:
        row["label"] = int(row.pop("answer"))
    write_rows(folder / FILES["boolq"], boolq)
    raw = {"activity_label": "Painting", "ctx_b": "he", "source_id": "x"}
    raw = [
        raw
        | {"ctx_a": f"A man opens bucket {i}.", "endings": r["choices"], "label": str(r["gold"])}
        for i, r in enumerate(hellaswag)
    ]
    write_rows(folder / "hellaswag_validation.jsonl", raw)
    return folder


@pytest.fixture(scope="session")
def llama(tiny) -> Path:
    """A sound model of two blocks; not to be changed."""
    return tiny("llama")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings(folder: Path, *names: str, **options) -> EvaluateConfig:
    return EvaluateConfig(tasks=list(names), task_data=str(folder), **options)


def score_file(model: Path, path: Path | None = None) -> ScoreFile:
    return ScoreFile(
        ModelDirectory(model), path, "model", World.alone(torch.device("cpu")), Console()
    )


def score(model: Path, folder: Path, *names: str, path: Path | None = None, **options) -> dict:
    """The scores of a model in this process."""
    config = settings(folder, *names, **options)
    found = find_tasks(config, Console())
    return by_task(zeroshot.score_tasks(score_file(model, path), found, config))


def by_task(scores: list[Score]) -> dict[str, dict]:
    """All that is known of each task: metrics, standard errors, facts."""
    tasks: dict[str, dict] = {}
    for s in scores:
        task = tasks.setdefault(s.name, {"items": s.n} | s.facts | s.details)
        task |= {s.measure: s.value, f"{s.measure}_stderr": s.stderr}
    return tasks


def build(task, folder: Path):
    """lm-eval's task."""
    (member,) = tasks_module.members(task.build(folder))
    return member


def prompts(member) -> list[tuple]:
    """What lm-eval asks a model about the rows of a task."""
    member.set_config("num_fewshot", 0)
    member.build_all_requests(limit=None, rank=0, world_size=1)
    return [request.args for request in member.instances]


def script(*args, ranks: int = 1) -> subprocess.CompletedProcess:
    """Runs a subcommand in processes of its own: lm-eval's libraries do not survive a fork."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / "cap_llm" / "train.py"), *map(str, args)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


# prompts and metrics are lm-eval's


def test_the_prompts_are_those_of_lm_eval(rows, tmp_path):
    """The first row of each task, as lm-eval's templates put it."""
    found = find_tasks(settings(rows, *LOCAL), Console())
    asked = {task.name: prompts(build(task, tmp_path)) for task in found}
    arc = "Question: What dries after 0 hours?\nAnswer:"
    assert asked["arc_easy"][:2] == [(arc, " red paint"), (arc, " blue paint")]
    assert asked["openbookqa"][0] == ("A wall of 0 metres is", " red paint")
    assert asked["piqa"][0] == ("Question: Paint wall 0.\nAnswer:", " Use brush 0.")
    boolq = "Wall 0 was painted today. \nQuestion: is wall 0 dry?\nAnswer:"
    assert asked["boolq"][:2] == [(boolq, " no"), (boolq, " yes")]
    rte = "Wall 0 is red.\nQuestion: Wall 0 has a colour. True or False?\nAnswer:"
    assert asked["rte"][:2] == [(rte, " True"), (rte, " False")]
    # COPA's two connectives
    assert asked["copa"][0][0] == "The bucket fell 0 times because"
    assert asked["copa"][2][0] == "The bucket fell 1 times therefore"
    assert asked["hellaswag"][0] == ("Painting: A man opens bucket 0. He", " stirs it 0 times.")
    assert asked["lambada_openai"][0] == ("She stirred bucket 0 and painted the", " red")


def test_nothing_but_the_rows_differs_from_the_built_in_task(rows, tmp_path):
    from lm_eval.tasks._yaml_loader import load_yaml

    data = {"dataset_path", "dataset_name", "dataset_kwargs", "process_docs", "include", "tag"}
    for task in find_tasks(settings(rows, *LOCAL, "wikitext"), Console()):
        member = build(task, tmp_path)
        built_in = load_yaml(task.spec)
        for field in set(built_in) - data:
            if not field.endswith("_split"):
                ours = getattr(member.config, field)
                wanted = built_in[field]
                if field == "metadata":
                    wanted = ours | wanted
                assert ours == wanted, (task.name, field)
        scored = built_in.get("test_split") or built_in["validation_split"]
        assert scored == (member.config.test_split or member.config.validation_split), task.name


def test_the_hubs_raw_fields_give_the_same_questions(rows, raw_rows, tmp_path):
    for name in ("boolq", "hellaswag"):
        both = []
        for folder in (rows, raw_rows):
            place = tmp_path / f"{name}-{folder.name}"
            place.mkdir()
            (task,) = find_tasks(settings(folder, name), Console())
            member = build(task, place)
            answers = [int(member.doc_to_target(doc)) for doc in member.eval_docs]
            both.append((prompts(member), answers))
        assert both[0] == both[1], name


def test_parquet_files_as_the_hub_keeps_them(rows, tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([LOCAL["rte"](i) for i in range(12)])
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "data" / "rte_validation.parquet")
    (ours,) = find_tasks(settings(tmp_path / "data", "rte"), Console())
    (theirs,) = find_tasks(settings(rows, "rte"), Console())
    assert ours.rows == theirs.rows


def test_the_figures_are_those_of_lm_eval_itself(llama, rows, tmp_path):
    """To the last digit, by the function behind its command line, which loads the model itself."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    names = ["arc_easy", "hellaswag", "copa", "boolq", "lambada_openai", "wikitext"]
    ours = score(llama, rows, *names)
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={llama},dtype=float32",
        device="cpu",
        batch_size=8,
        tasks=[str(t._write(tmp_path)) for t in find_tasks(settings(rows, *names), Console())],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=100,
        log_samples=False,
    )
    for name in names:
        for metric in ("acc", "acc_norm"):
            for key in (metric, f"{metric}_stderr"):
                assert ours[name].get(key) == theirs["results"][name].get(f"{key},none"), name
        assert ours[name]["items"] == theirs["n-samples"][name]["effective"]
        assert ours[name]["version"] == theirs["versions"][name]
    close = pytest.approx(theirs["results"]["lambada_openai"]["perplexity,none"], rel=1e-6)
    assert ours["lambada_openai"]["perplexity"] == close
    close = pytest.approx(theirs["results"]["wikitext"]["word_perplexity,none"], rel=1e-6)
    assert ours["wikitext"]["word_perplexity"] == close


def test_word_perplexity_reads_the_raw_test_set(data, tmp_path):
    """62 articles, as the hub's data set of documents has, and no word lost."""
    (task,) = find_tasks(settings(data / "zeroshot", "wikitext"), Console())
    assert task.origin == "wiki.test.raw"
    assert len(task.rows) == 62
    assert task.rows[0]["page"].startswith(" = Robert Boulter = ")
    text = (data / "wikitext2" / "wiki.test.raw").read_text()
    assert " ".join(r["page"] for r in task.rows).split() == text.split()


# ranks


def test_two_ranks_give_what_one_gives(llama, rows, tmp_path):
    """Of all three kinds of requests; sums of log-likelihoods are equal to the bit."""
    names = ["arc_easy", "boolq", "lambada_openai", "wikitext", str(rows / "colours.yaml")]
    one = score(llama, rows, *names)
    args = ["zeroshot", llama, "--data", rows, "--out", tmp_path / "two.json", "--tasks", *names]
    done = script(*args, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("arc_easy: acc ") == 1  # the second rank is silent
    assert "it/s" not in done.stderr
    content = read_scores(tmp_path / "two.json")
    two = by_task(content.scores)
    assert list(two) == ["arc_easy", "boolq", "lambada_openai", "wikitext", "colours"]
    assert all("zeroshot" in s.job["command"] for s in content.scores)
    assert all(s.job["hardware"]["ranks"] == 2 for s in content.scores)
    for task in (*one.values(), *two.values()):
        del task["seconds"]
    assert two == one and content.model == str(llama)


# what is kept


def test_finished_tasks_are_not_scored_again(llama, rows, own_rows, tmp_path, monkeypatch):
    path = tmp_path / "scores.json"
    first = score(llama, rows, "copa", "piqa", path=path)
    opened = []
    start = zeroshot._open
    monkeypatch.setattr(zeroshot, "_open", lambda *a: opened.append(a) or start(*a))
    assert score(llama, rows, "piqa", "copa", path=path) == first
    assert not opened
    # a limit is another figure, beside the whole one
    score(llama, rows, "piqa", path=path, limit=5)
    both = by_task(read_scores(path).scores)
    assert both["piqa"] == first["piqa"]
    assert both["piqa first 5"]["items"] == 5 and both["piqa first 5"]["of"] == 12
    # other rows, and other weights, are scored
    write_rows(own_rows / FILES["piqa"], [LOCAL["piqa"](i) for i in range(9)])
    assert score(llama, own_rows, "piqa", path=path)["piqa"]["items"] == 9
    other = Path(shutil.copytree(llama, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"].zero_()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    score(other, rows, "copa", path=path)
    assert list(by_task(read_scores(path).scores)) == ["copa"]
    assert len(opened) == 3


def test_what_was_scored_before_a_stop_is_kept(llama, rows, tmp_path, monkeypatch):
    path = tmp_path / "scores.json"
    do = zeroshot._score

    def stopped(lm, task, *rest):
        if task.name == "piqa":
            raise KeyboardInterrupt
        return do(lm, task, *rest)

    monkeypatch.setattr(zeroshot, "_score", stopped)
    with pytest.raises(KeyboardInterrupt):
        score(llama, rows, "copa", "piqa", path=path)
    assert list(by_task(read_scores(path).scores)) == ["copa"]


def test_a_mean_over_a_part_of_a_set_is_called_partial(llama, rows, capsys):
    scores = score(llama, rows, "sds", limit=4)
    said = capsys.readouterr().out
    there = ["copa", "lambada_openai", "openbookqa", "piqa", "rte"]
    mean = sum(scores[f"{name} first 4"]["acc"] for name in there) / 5
    assert f"sds: mean acc {mean:.4f} of 5 tasks" in said
    assert "task winogrande" in said and "winogrande_validation.jsonl" in said
    assert "partial: without storycloze_2016, winogrande" in said


def test_a_group_of_lm_evals_has_one_score(llama, rows, tmp_path):
    """As MMLU: weighted by the sizes of its tasks."""
    from lm_eval.tasks import TaskManager

    parts = find_tasks(settings(rows, "copa", "piqa"), Console())
    group = {"group": "walls", "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    group["task"] = []
    for part in parts:
        path = part._write(tmp_path)
        path.write_text(path.read_text().replace(f"task: {part.name}", f"task: walls_{part.name}"))
        group["task"].append(f"walls_{part.name}")
    (tmp_path / "walls.yaml").write_text(json.dumps(group))
    manager = TaskManager(include_defaults=False, include_path=tmp_path)
    task = tasks_module.Task("walls", "walls", built=manager.load(["walls"])["groups"]["walls"])
    scores = zeroshot.score_tasks(score_file(llama), [task], settings(rows))
    walls = by_task(scores)["walls"]
    apart = score(llama, rows, "copa", "piqa")
    assert walls["items"] == 24
    mean = (apart["copa"]["acc"] + apart["piqa"]["acc"]) / 2
    assert walls["acc"] == pytest.approx(mean)


# offline, and bad input


def test_no_network_is_touched(llama, rows, monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"asked for {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert score(llama, rows, "copa", "arc_easy")["copa"]["items"] == 12


def refused(*args, **options) -> str:
    with pytest.raises(UserError) as error:
        find_tasks(settings(*args, **options), Console())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_named_task_that_is_missing_is_refused_before_a_model_is_read(rows):
    message = refused(rows, "winogrande", "storycloze_2016", "copa")
    assert "winogrande_validation.jsonl" in message and "HF_HUB_OFFLINE" in message
    assert "storycloze_2016_test.jsonl" in message
    assert "winogrande_validation.jsonl" in message


def test_an_unknown_task_is_refused(rows):
    assert "arc_easy" in refused(rows, "arc_esay")
    assert "does not exist" in refused(rows, "mine.yaml")


def test_a_task_file_that_lm_eval_cannot_load_is_refused(own_rows):
    path = own_rows / "mine.yaml"
    path.write_text("dataset_path: json\n")
    assert "names no task" in refused(own_rows, str(path))
    path.write_text("task: mine\ndataset_path: json\ntest_split: test\n")
    assert "mine.yaml" in refused(own_rows, str(path))


def test_a_folder_that_is_none_is_refused(rows):
    assert "is not a directory" in refused(rows / "nothing", "copa")


def test_two_files_of_a_task_are_refused(own_rows):
    shutil.copy(own_rows / FILES["piqa"], own_rows / "piqa.jsonl")
    assert "piqa.jsonl, piqa_validation.jsonl" in refused(own_rows, "piqa")


@pytest.mark.parametrize(
    ("task", "change", "words"),
    [
        ("arc_easy", {"choices": {"text": ["a"], "label": ["A", "B"]}}, "choices is"),
        ("arc_easy", {"answerKey": "E"}, 'answerKey is "E"'),
        ("openbookqa", {"question_stem": None}, "question_stem is null"),
        ("piqa", {"label": -1}, "label is -1"),
        ("boolq", {"answer": "yes"}, "label is missing"),
        ("rte", {"sentence2": ""}, 'sentence2 is ""'),
        ("copa", {"question": "why"}, "cause or effect"),
        ("hellaswag", {"gold": 4}, "gold is 4"),
        ("hellaswag", {"query": ...}, "query is missing"),
    ],
)
def test_a_malformed_row_is_named(own_rows, task, change, words):
    """The file, the line, the field, and what it must be."""
    rows = [LOCAL[task](i) for i in range(5)]
    rows[2] = {k: v for k, v in (rows[2] | change).items() if v is not ...}
    path = write_rows(own_rows / FILES[task], rows)
    message = refused(own_rows, task)
    assert message.startswith(f"{path}, line 3: ") and words in message


def test_a_damaged_file_is_named(own_rows):
    path = own_rows / FILES["piqa"]
    path.write_text(json.dumps(LOCAL["piqa"](0)) + "\n{oops\n")
    assert refused(own_rows, "piqa") == f"{path}, line 2: not a JSON object"
    path.write_text("\n")
    assert "no rows" in refused(own_rows, "piqa")
    path.write_bytes(b"\xff\xfe\xff")
    assert "cannot be read" in refused(own_rows, "piqa")


def test_rows_may_have_a_mark_half_a_pair_a_large_number_and_a_name_in_capitals(own_rows, capsys):
    rows = [LOCAL["piqa"](i) for i in range(3)]
    rows[1]["goal"] += " \ud83d"
    lines = "".join(json.dumps(row)[:-1] + f', "id": {"9" * 5000}}}\n' for row in rows)
    path = own_rows / "PIQA_validation.JSONL.gz"
    path.write_bytes(gzip.compress(("\ufeff" + lines).encode()))
    (own_rows / FILES["piqa"]).unlink()
    (task,) = find_tasks(EvaluateConfig(tasks=["piqa"], task_data=str(own_rows)), Console())
    assert [row["goal"][-1] for row in task.rows] == [LOCAL["piqa"](0)["goal"][-1], "\ufffd"] + [
        LOCAL["piqa"](2)["goal"][-1]
    ]
    said = capsys.readouterr().out
    assert "1 lone surrogates" in said and "line 2" in said


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ("piqa", "[" * 100_000),
        ("piqa", '{"goal": "a", "sol1": "b", "sol2": "c", "label": NaN}'),
        ("hellaswag", '{"query": "a", "choices": ["b", "c"], "gold": "²"}'),
        ("hellaswag", '{"query": "a", "choices": ["b", "c"], "gold": "' + "9" * 5000 + '"}'),
    ],
)
def test_an_odd_value_of_a_row_is_refused_by_its_line(own_rows, task, line):
    path = own_rows / FILES[task]
    path.write_text(line + "\n", encoding="utf-8")
    assert refused(own_rows, task).startswith(f"{path}, line 1: ")


def test_an_encoder_is_refused(tiny, rows):
    with pytest.raises(UserError, match="BertForMaskedLM"):
        score(tiny("bert"), rows, "copa")


def test_a_model_that_overflows_is_refused(llama, rows, tmp_path):
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"].fill_(torch.inf)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="copa: "):
        score(model, rows, "copa")


def test_a_model_without_some_weights_is_refused(llama, rows, tmp_path):
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="model.norm.weight"):
        score(model, rows, "copa")


def test_requests_longer_than_the_model_are_counted(tiny, own_rows):
    """They are cut at the left, as lm-eval does; the figure says how many."""
    long = [
        LOCAL["boolq"](i) | {"passage": "A wall dries slowly. " * 40 * (i % 2 + 1)}
        for i in range(4)
    ]
    long += [LOCAL["boolq"](1)]
    write_rows(own_rows / FILES["boolq"], long)
    entry = score(tiny("llama", max_position_embeddings=128), own_rows, "boolq")["boolq"]
    assert entry["truncated"] == 8 and entry["items"] == 5


# the commands


def test_the_stage_scores_each_model(llama, raw_rows, tmp_path, monkeypatch, capfd):
    """Dense and pruned, beside the model; scores of the dense model are not copied to the other."""
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    shutil.copy(write_rows(tmp_path / "x.json", [{"old": 1}]), model / "scores.json")
    out = tmp_path / "run"
    args = [
        *("--model.path", model, "--output_dir", out, "--oneshot.method", "magnitude"),
        *("--oneshot.sparsity", "0.9", "--evaluate.corpora", "[]"),
        *("--evaluate.tasks", "[hellaswag, sds]", "--evaluate.task_data", raw_rows),
    ]
    monkeypatch.setattr(sys, "argv", ["cap-llm", *map(str, args)])
    assert train.main() == 0, capfd.readouterr().err
    files = [read_scores(out / stage / "scores.json") for stage in ("dense", "oneshot")]
    assert files[0].weights_sha256 != files[1].weights_sha256
    dense, pruned = (by_task(file.scores) for file in files)
    assert dense.keys() == pruned.keys() >= {"hellaswag", "copa", "rte", "piqa"}
    perplexities = [tasks["lambada_openai"]["perplexity"] for tasks in (dense, pruned)]
    assert perplexities[0] != perplexities[1] and all(map(math.isfinite, perplexities))
    assert dense["rte"]["origin"] == FILES["rte"]
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {m["name"] for m in logged} >= {"dense copa", "oneshot copa"}


def test_a_dry_run_names_what_is_missing(llama, rows, tmp_path, monkeypatch, capfd):
    args = ["--model.path", llama, "--output_dir", tmp_path / "run", "--stages", "[evaluate]"]
    args += ["--evaluate.corpora", "[]", "--evaluate.tasks", "[wanda]", "--dry-run"]
    args += ["--evaluate.task_data", rows]
    monkeypatch.setattr(sys, "argv", ["cap-llm", *map(str, args)])
    assert train.main() == 0
    assert "winogrande" in capfd.readouterr().out
    assert not (tmp_path / "run").exists()


def test_the_perplexity_script_gives_the_stages_figure(llama, text_file, tmp_path, monkeypatch):
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    done = script("perplexity", model, "--corpora", text_file, "--window", 64, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ppl_token@64") == 1
    (ours,) = read_scores(model / "scores.json").scores
    out = tmp_path / "run"
    args = ["--model.path", llama, "--output_dir", out, "--stages", "[evaluate]"]
    args += ["--evaluate.corpora", f"[{text_file}]", "--evaluate.window", "64"]
    monkeypatch.setattr(sys, "argv", ["cap-llm", *map(str, args)])
    assert train.main() == 0
    (stage,) = read_scores(out / "dense" / "scores.json").scores
    assert ours.value == pytest.approx(stage.value, rel=1e-5)
    assert ours.facts == stage.facts


def test_figures_of_other_weights_are_not_taken(tiny, text_file, tmp_path, monkeypatch):
    file, values = tmp_path / "scores.json", []
    for model in (tiny("llama"), tiny("llama", seed=1)):
        args = [model, "--corpora", text_file, "--window", 64, "--out", file]
        monkeypatch.setattr(sys, "argv", ["cap-llm", "perplexity", *map(str, args)])
        assert train.main() == 0
        (entry,) = read_scores(file).scores
        values.append(entry.value)
    assert values[0] != values[1]


def test_a_run_scores_a_model_anew_that_has_changed_in_its_place(
    tiny, text_file, tmp_path, monkeypatch, capfd
):
    model, figures = tmp_path / "model", []
    args = ["--model.path", model, "--output_dir", tmp_path / "run", "--stages", "[evaluate]"]
    args += ["--evaluate.corpora", f"[{text_file}]", "--evaluate.window", 64]
    monkeypatch.setattr(sys, "argv", ["cap-llm", *map(str, args)])
    for seed in (0, 0, 1):
        shutil.copytree(tiny("llama", seed=seed), model, dirs_exist_ok=True)
        assert train.main() == 0
        said = capfd.readouterr().out
        (entry,) = read_scores(tmp_path / "run" / "dense" / "scores.json").scores
        figures.append(entry)
    assert figures[0] == figures[1]
    assert figures[2].value != figures[0].value
    assert "scores.json" in said


@pytest.mark.parametrize("content", [{}, [], {"scores": 3}], ids=str)
def test_a_file_that_holds_no_scores_is_rejected(
    content, llama, text_file, tmp_path, monkeypatch, capfd
):
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(content))
    args = [llama, "--corpora", text_file, "--window", 64, "--out", file]
    monkeypatch.setattr(sys, "argv", ["cap-llm", "perplexity", *map(str, args)])
    assert train.main() == 2
    said = capfd.readouterr().err
    assert str(file) in said and said.count("\n") == 1


def test_the_scripts_refuse_in_one_line(tiny, llama, rows, text_file, tmp_path, monkeypatch, capfd):
    for command, *args in (
        ("zeroshot", tiny("bert"), "--tasks", "copa"),
        ("zeroshot", llama, "--tasks", "copa", "--out", tmp_path / "none" / "x.json"),
        ("zeroshot", llama, "--tasks", ","),
        ("perplexity", tmp_path / "nothing"),
        ("perplexity", llama, "--window", "4096", "--corpora", __file__),
        ("perplexity", llama, "--window", "4096", "--corpora", text_file),
        ("perplexity", llama, "--corpora", "nothing"),
        ("perplexity", llama, "--device", "tpu"),
        ("zeroshot", llama, "--data", rows / "nothing"),
    ):
        monkeypatch.setattr(sys, "argv", ["cap-llm", command, *map(str, args)])
        assert train.main() == 2
        said = capfd.readouterr().err
        assert said.count("\n") == 1 and said.startswith("cap-llm: error: ")
        assert "evaluate." not in said and "runtime." not in said  # which they have not
    assert not (llama / "scores.json").exists()

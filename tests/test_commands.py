"""The command line: subcommands, help, hints, completion, quiet runs, model cards and uploads."""

import json
import re
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
from support import ROOT, environment

import cap_llm
from cap_llm import train
from cap_llm.cli.commands import COMMANDS
from cap_llm.models import mask_file as masks
from cap_llm.report.card import FILE, write_cards
from cap_llm.runtime.console import Console


@pytest.fixture
def call(monkeypatch, capfd):
    """Calls the entry in this process; its exit code and what it printed."""

    def run(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cap-llm", *map(str, words)])
        code = train.main()
        return code, *capfd.readouterr()

    return run


# subcommands and help


def test_help_lists_the_subcommands(call):
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    assert out.startswith("usage: cap-llm")
    assert all(re.search(rf"^  {name}  +\w", out, re.MULTILINE) for name in COMMANDS)
    assert "cap-llm run --help" in out and "completion" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_each_help_begins_with_three_examples(call, name):
    code, out, err = call(name, "--help")
    assert (code, err) == (0, "")
    top = out.partition("examples:\n")[2].partition("\n\n")[0].splitlines()
    assert len(top) == 3 and all(line.startswith("  cap-llm") for line in top)
    assert "examples:" in "".join(out.splitlines(keepends=True)[:4])


@pytest.mark.parametrize("words", ["--help", "--version", "status --help", "status ."])
def test_quick_commands_do_not_import_torch(words):
    code = f"""
import sys
from cap_llm import train
sys.argv = ["cap-llm", *{words.split()}]
train.main()
sys.exit("torch" in sys.modules or "transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True)
    assert done.returncode == 0


def test_help_of_run_does_not_import_torch():
    code = "import sys; from cap_llm import train; sys.argv = ['', 'run', '--help']; train.main()"
    code += "; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True)
    assert done.returncode == 0


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "cap_llm", "--version"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["cap-llm", cap_llm.__version__])


@pytest.mark.parametrize("option", ["--local_rank=0", "--local-rank=0"])
def test_the_launchers_option_is_dropped(call, option):
    assert call(option, "--version")[0] == 0
    assert call(option, "--dry-run")[2].count("--model.path") == 1


@pytest.mark.parametrize("name", [n for n in COMMANDS if n not in ("run", "demo")])
def test_a_missing_argument_is_a_usage_error(call, name):
    code, _, err = call(name)
    assert code == 2 and err.startswith(f"usage: cap-llm {name}")


def test_no_argument_shows_the_help(call):
    code, out, _ = call()
    assert code == 2 and "examples:" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["opt-125m-50"], "--config opt-125m-50"),
        (["run", "opt-125m-50"], "--config opt-125m-50"),
        (["opt-125m-5O"], "--config opt-125m-50"),
        (["--model", "facebook/opt-125m"], "--model.path"),
        (["--model=facebook/opt-125m"], "--model.path"),
        (["stauts", "runs/x"], "status"),
        (["xyzzy"], "perplexity"),
    ],
)
def test_a_hint_says_what_was_meant(call, words, expected):
    code, _, err = call(*words)
    assert code == 2 and expected in err and err.count("\n") == 1


def test_a_model_directory_without_its_option_gets_a_hint(call, tiny):
    folder = tiny("llama")
    assert f"--model.path {folder}" in call(folder)[2]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("cap-llm sta", {"status"}),
        ("cap-llm status --j", {"--json"}),
        ("cap-llm perplexity --win", {"--window"}),
        ("cap-llm --oneshot.met", {"--oneshot.method"}),
        ("cap-llm run --oneshot.meth", {"--oneshot.method"}),
        ("cap-llm --oneshot.method al", {"alps"}),
        ("cap-llm run --evaluate.dense f", {"false"}),
        ("cap-llm --config own", {"own"}),
    ],
)
def test_completion(line, expected, tmp_path):
    pytest.importorskip("argcomplete")
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "found"), "_ARGCOMPLETE_IFS": "\n"}
    command = [sys.executable, str(ROOT / "cap_llm" / "train.py")]
    subprocess.run(command, env=environment() | asked, capture_output=True, check=False)
    found = (tmp_path / "found").read_text().splitlines()
    assert {word.strip() for word in found} == expected


# the console and the log


def test_a_quiet_run_prints_only_warnings_and_the_report(copy, call):
    """The same run again: all of it is done."""
    run = copy("run")
    before = (run / "log.txt").read_text()
    code, out, err = call("--config", run / "config.yaml", "--output_dir", run, "--quiet")
    assert (code, err) == (0, "")
    # other work on this machine is worth a warning
    lines = [line for line in out.splitlines() if not line.startswith("cores:")]
    assert lines == [f"report: {run / 'report.html'}"]
    assert len((run / "log.txt").read_text()) > len(before)


def test_warnings_and_loud_lines_are_printed_when_quiet(capsys):
    console = Console()
    console.quiet = True
    console.say("a line")
    console.table("a table", ["a"], [["b"]])
    with console.bar("a bar", 1, "units") as bar:
        bar.advance()
    console.say("a warning", style="yellow")
    console.say("a result", loud=True)
    assert capsys.readouterr().out == "a warning\na result\n"


def test_each_line_of_the_log_has_its_time(tmp_path, capsys):
    console = Console()
    console.log_to(tmp_path / "log.txt")
    console.say("one\n\ntwo")
    console.table("title", ["a", "b"], [["c", "d"]])
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert len(lines) > 6
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    assert [line[9:] for line in lines] == capsys.readouterr().out.splitlines()


# model cards


def metadata(folder) -> dict:
    return huggingface_hub.ModelCard.load(folder / FILE).data.to_dict()


def test_a_finished_stage_has_a_card(real):
    text = (real / "oneshot" / FILE).read_text()
    assert "cap-llm" in metadata(real / "oneshot")["tags"]
    (score,) = json.loads((real / "oneshot" / "scores.json").read_text())["scores"]
    for part in ("SparseGPT", "50.00%", "8 x 64 tokens", f"{score['value']:.4g}"):
        assert part in text
    assert cap_llm.__version__ in text and "from_pretrained" in text
    assert str(real) not in text and "/tmp" not in text  # a card goes where the model goes
    assert not (real / "dense" / FILE).exists()


@pytest.mark.parametrize(
    ("path", "base"), [("facebook/opt-125m", "facebook/opt-125m"), ("/models/opt", None)]
)
def test_only_a_hub_name_is_the_base_model_of_the_metadata(copy, path, base):
    run = copy("run", {"oneshot/result.json": lambda content: content.update(dense=path)})
    write_cards(run)
    assert metadata(run / "oneshot").get("base_model") == base
    assert "/models" not in (run / "oneshot" / FILE).read_text()


def test_a_changed_card_is_kept(copy):
    run = copy("run")
    (run / "oneshot" / FILE).write_text("# Mine\n")
    write_cards(run)
    assert (run / "oneshot" / FILE).read_text() == "# Mine\n"


def test_the_card_of_the_source_is_not_copied(copy, call, text_file, tmp_path):
    run = copy("run")
    (run / "oneshot" / FILE).write_text("# The source's\n")
    words = ["--model.path", run / "oneshot", "--output_dir", tmp_path / "again"]
    words += ["--oneshot.method", "magnitude", "--oneshot.sparsity", "0.6", "--stages", "[oneshot]"]
    assert call(*words, "--runtime.device", "cpu")[0] == 0
    text = (tmp_path / "again" / "oneshot" / FILE).read_text()
    assert "The source's" not in text and "magnitude" in text


# uploads


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub; what it was asked to do."""
    asked = []

    class Hub:
        def create_repo(self, repo_id, **options):
            asked.append((repo_id, options))

        def upload_folder(self, **options):
            asked.append(options)
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return asked


def test_push_uploads_the_model_and_its_card_and_no_records(copy, call, hub):
    run = copy("run")
    code, out, _ = call("push", run / "oneshot", "me/model")
    assert code == 0 and "https://hub/commit" in out
    (repo, options), upload = hub
    assert repo == "me/model" and options["private"] is True
    files = set(upload["allow_patterns"])
    assert {FILE, "config.json", masks.FILE, "sparsity.json", "tokenizer.json"} <= files
    assert all((run / "oneshot" / name).is_file() for name in files)
    assert any(name.endswith(".safetensors") for name in files - {masks.FILE})
    assert not files & {"done.json", "recipe.json", "result.json", "scores.json"}


def test_push_makes_a_public_repository_if_asked(copy, call, hub):
    assert call("push", copy("run") / "oneshot", "me/model", "--public")[0] == 0
    assert hub[0][1]["private"] is False


@pytest.mark.parametrize("damage", ["unfinished", "changed", "no weights", "dense", "missing"])
def test_push_refuses_what_is_not_a_finished_model(copy, call, hub, damage):
    run = copy("run")
    folder = run / ("dense" if damage == "dense" else "oneshot")
    if damage == "unfinished":
        (folder / "done.json").unlink()
    elif damage == "changed":
        with open(folder / masks.FILE, "ab") as file:
            file.write(b"more")
    elif damage == "no weights":
        for path in folder.glob("model*"):
            path.unlink()
    elif damage == "missing":
        shutil.rmtree(folder)
    code, _, err = call("push", folder, "me/model")
    assert code == 2 and str(folder) in err and err.count("\n") == 1
    assert hub == []


def test_a_failed_upload_is_one_line(copy, call, monkeypatch):
    class Hub:
        def create_repo(self, *_, **__):
            raise OSError("401\nUnauthorized")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    code, _, err = call("push", copy("run") / "oneshot", "me/model")
    assert code == 2 and "401" in err and err.count("\n") == 1

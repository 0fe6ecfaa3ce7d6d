"""What the repository promises about itself: imports, public names, generated pages."""

import ast
import subprocess
import sys

import pytest
from support import ROOT, environment

import cap_llm

ORDER = ["runtime", "sparsity", "config", "text", "models", "solvers", "stages", "blockwise"]
ORDER += ["contrast", "training", "tasks", "recovery", "evaluation", "report", "preflight"]
ORDER += ["pipeline", "cli"]


def test_imports_point_one_way():
    package = ROOT / "cap_llm"
    for path in package.rglob("*.py"):
        part = path.relative_to(package).parts[0].removesuffix(".py")
        if part not in ORDER:
            continue  # the entry may import everything
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cap_llm."):
                imported = node.module.split(".")[1]
                assert ORDER.index(imported) <= ORDER.index(part), f"{path} imports {node.module}"


def test_no_automatic_class_asks_whether_to_run_code():
    """Left to themselves they ask on a terminal, and run the directory's code on "y"."""
    for path in [*(ROOT / "cap_llm").rglob("*.py"), *(ROOT / "eval").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Call) else ""
            if text.startswith("Auto") and ".from_pretrained(" in text.split("\n")[0][:50]:
                assert "trust_remote_code=False" in text or "**FROM_DIRECTORY" in text, text


def test_no_module_beside_the_entry_is_named_like_a_library():
    names = {p.stem for p in (ROOT / "cap_llm").iterdir() if p.name[0] not in "_."}
    assert not names & set(sys.stdlib_module_names)


def test_the_page_of_options_is_current():
    from option_table import PAGE, option_page

    assert PAGE.read_text() == option_page(), "run python eval/option_table.py"


def test_public_names_are_loaded_on_first_use():
    code = "import sys, cap_llm; assert 'torch' not in sys.modules; print(cap_llm.prune.__name__)"
    ended = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True)
    assert ended.stdout == b"prune\n"
    with pytest.raises(AttributeError):
        cap_llm.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", cap_llm.__all__)
def test_public_names_are_there(name):
    assert callable(getattr(cap_llm, name))


def test_the_pages_of_results_are_current():
    from results_pages import PAGES, PICTURES, with_tables

    for name in PAGES:
        page = (ROOT / "docs" / "results" / name).read_text()
        assert page == with_tables(page), "run python eval/results_pages.py"
    for source, copy in PICTURES.items():
        assert copy.read_bytes() == source.read_bytes(), "run python eval/results_pages.py"

"""What the repository promises about itself: imports, the README's table."""

import ast
import sys

from support import ROOT

ORDER = ["runtime", "sparsity", "config", "text", "models", "solvers", "blockwise", "contrast"]
ORDER += ["training", "tasks", "recovery", "evaluation", "report", "preflight", "pipeline", "cli"]


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


def test_the_readme_holds_the_current_options():
    from option_table import with_table

    readme = (ROOT / "README.md").read_text()
    assert readme == with_table(readme), "run python eval/option_table.py"

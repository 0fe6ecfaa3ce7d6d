"""Models with results and scores, for the tests of what is compared, and the main table."""

from pathlib import Path

from cap_llm.evaluation.scores import Score
from cap_llm.models.result import Result
from cap_llm.report.comparison import Table, compare
from cap_llm.report.runs import Model

FACTS = {"window": 2048, "windows": 40, "limit": None, "bos": "<s>", "text_sha256": "abc"}
FACTS |= {"computed_in": "float32", "torch": "2.13.0"}
C4 = "128 x 2048 tokens of allenai/c4 train"


def ppl(value: float, data: str = "text", **facts) -> Score:
    return Score("ppl_token", data, value, 2047 * 40, None, FACTS | facts)


def accuracy(value: float, task: str, stderr: float | None = 0.01, n: int = 100, **facts) -> Score:
    facts = {"limit": None, "version": 1.0, "rows_sha256": task, "lm_eval": "0.4.13"} | facts
    return Score("acc", task, value, n, stderr, facts)


def model(name: str, *scores: Score, run: str = "", stage: str = "oneshot", **fields) -> Model:
    """A model pruned to 50%; its name stands for its settings."""
    fields = {"method": name, "amount": "50%", "dense": "some/model", "sparsity": 0.5} | fields
    result = Result(stage, **({"identity": name, "weights": name, "calibration": "text"} | fields))
    return Model(Path(run or name), Path(run or name) / stage, result, list(scores), name)


def dense(*scores: Score, **fields) -> Model:
    fields = {"method": "dense", "amount": "", "sparsity": None, "calibration": None} | fields
    return model("dense", *scores, stage="dense", **fields)


def quality(*models: Model) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """Headings, cells by row name, and notes of the first table."""
    table = compare(list(models))[0].tables[0]
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    return [" ".join(column.split()) for column in table.columns[1:]], rows, table.notes


def table(models: list[Model], title: str) -> Table:
    return next(t for t in compare(models)[0].tables if t.title.startswith(title))


def best(table: Table, column: str) -> set[str]:
    (at,) = [i for i, label in enumerate(table.columns) if column in label]
    return {row[0].text for row in table.rows if row[at].best}

"""What runs left behind: every model of a run directory, its figures, and where they come from.

A figure carries the facts that must agree before it is compared with another one:
`comparison.py` puts two figures into one column only if they do. Run directories of other versions,
unfinished and damaged ones are read as far as they go; what is wrong with them is said, not raised.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

import cap_llm
from cap_llm.models.files import weight_files
from cap_llm.models.masks import PRUNED
from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import read_json, read_metrics
from cap_llm.runtime.rundir import CONTENTS
from cap_llm.stages import MODELS
from cap_llm.text.corpora import NAMES

ORDER = ("dense", "given", *MODELS)  # stages of another version come behind
_METHODS = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}
_METHODS |= {"admm_grad": "ADMM-grad", "alps": "ALPS"}
_ADDED = {"sds": "SDS", "reconstruct": "reconstruction", "recover": "recovery"}
_METRICS = {"task": "acc", "norm": "acc_norm", "word": "word_perplexity"}  # lm-eval's names
LIBRARIES = ("torch", "transformers", "lm_eval")  # that compute a zero-shot score
SCORES = ("ppl", "word", "task")  # what makes a model a scored one
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass
class Figure:
    """One number.

    Attributes:
        kind: `ppl` (ppl_token), `word` (lm-eval's word_perplexity), `task` (accuracy), `norm`
            (normalised accuracy), `mean`, `gap`, or the name of a cost: `on disk`, `bit-packed`,
            `peak memory`, `GPU memory` (bytes), `time` (seconds), `trained` (tokens).
        name: the corpus, task or set of tasks; empty for a cost.
        value: shares are in [0, 1].
        facts: what must agree before it is compared. `calibration` None agrees with any.
        stderr: the standard error, where the measure has one.
        environment: of the job that measured it, where that says so; as in `Result`.
    """

    kind: str
    name: str
    value: float
    facts: dict[str, str | int | None] = field(default_factory=dict)
    stderr: float | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """One model of one run.

    Attributes:
        name: what a table calls it.
        stage: the stage that made it; `dense` for the dense model, `given` for a pruned one that
            the run started from and no run made.
        run: the run directory.
        dense: which dense model it comes from: path or hub name, with the revision.
        before: the pruned model that its stage started from, perhaps of another run.
        method: `SparseGPT + refit`, with ` + recovery` and the like for later stages.
        amount: `50 %` or `2:4`; empty for a dense model.
        stored_as: the type of its weights on disk, where its files say it.
        sparsity: share of zeros in the pruned matrices and in the whole model.
        recipe: the settings of all stages up to this one, as text, without their seeds.
        seeds: those seeds.
        calibration: how much of which text the solvers saw; None if none did.
        drawn: the seed that drew it and a checksum of the ids.
        training: the text of the recovery and the length of its sequences.
        figures: what was measured.
        layers: name, sparsity and relative output error of each pruned matrix.
        curve: (tokens, held-out perplexity) along the recovery, a list for each level.
        curve_dense: held-out perplexity of the dense model there.
        status: empty, or what is wrong: `unfinished`, `not scored`, ...
        environment: command, directory, versions and machine of the job that made it.
    """

    name: str
    stage: str
    run: Path
    dense: str
    before: Result | None = None
    method: str = ""
    amount: str = ""
    stored_as: str = ""
    sparsity: tuple[float, float] | None = None
    recipe: str = ""
    seeds: tuple[int, ...] = ()
    calibration: str | None = None
    drawn: tuple = ()
    training: str | None = None
    figures: list[Figure] = field(default_factory=list)
    layers: list[tuple[str, float, float | None]] = field(default_factory=list)
    curve: list[list[tuple[float, float]]] = field(default_factory=list)
    curve_dense: float | None = None
    status: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def figures_of(self, *kinds: str) -> list[Figure]:
        """The figures of some kinds."""
        return [figure for figure in self.figures if figure.kind in kinds]


def run_directories(paths: list[Path], console: Console) -> list[Path]:
    """The run directories among `paths`, and those directly inside the others.

    What is neither, as the pictures and tables of a report beside its runs, is named to `console`.

    Raises:
        UserError: none of `paths` holds a run, or one does not exist.
    """
    found, others = [], []
    for path in paths:
        inside = [path] if _is_run(path) else []
        if not inside and os.path.isdir(path):
            with contextlib.suppress(OSError):  # one that may not be looked at holds none
                inside = sorted(p for p in path.iterdir() if _is_run(p))
        known = {p.resolve() for p in found}
        found += [p for p in inside if p.resolve() not in known]
        others += [] if inside else [path]
    if missing := [path for path in others if not os.path.exists(path)] or (not found and others):
        path = missing[0]
        what = "holds no run" if os.path.isdir(path) else "is a file"
        what = what if os.path.exists(path) else "does not exist"
        raise UserError(
            f"{path} {what}: give the output_dir of a run (it has an environment.json), or a "
            "folder of such directories"
        )
    if others:
        console.say(f"no runs, left out: {', '.join(map(str, others))}")
    return found


def collect(folder: Path) -> list[Result]:
    """The models of a run directory, in the order of the pipeline.

    Raises:
        UserError: it is no run directory.
    """
    if not _is_run(folder):
        raise UserError(f"{folder} is no run directory: it has no environment.json")
    try:
        return _read(folder)
    except Exception:  # of any kind: the files may be anything
        status = ["not as this version writes it"]
        return [Result(folder.resolve().name, "none", folder, "unknown model", status=status)]


def _read(folder: Path) -> list[Result]:
    troubles: list[str] = []
    facts = _part(folder / "environment.json", dict, troubles) or {}
    settings = _settings(folder / "config.yaml")
    made = _models(folder, facts, settings)
    title = str(facts.get("run") or folder.resolve().name)
    dense = _dense(folder, {}, settings, facts)
    nothing = Result(title, "none", folder, dense, environment=_job(facts))
    results = list(made.values()) or [nothing]
    if made and not results[-1].figures_of(*SCORES):
        results[-1].status.append("not scored")
    asked = [s for s in settings.get("stages") or [] if s not in (*made, "evaluate")]
    if asked:
        results[-1].status.append(f"{asked[0]} not begun")
    results[-1].status += troubles
    version = (facts.get("versions") or {}).get("cap_llm")
    for result in results:
        if version and version != cap_llm.__version__:
            result.status.append(f"of cap_llm {version}")
    return results


def _models(folder: Path, facts: dict, settings: dict) -> dict[str, Result]:
    """The models of a run by the names of their folders, in the order of the pipeline."""
    marks = ("recipe.json", "perplexity.json", "done.json")
    folders = [p for p in folder.iterdir() if p.name != "evaluate"]  # it makes no model
    stages = [p.name for p in folders if any((p / mark).exists() for mark in marks)]
    # conversions of models that came in another format
    stages = [s for s in stages if s != "source" and not s.endswith("-source")]
    stages.sort(key=lambda s: (ORDER.index(s) if s in ORDER else len(ORDER), s))
    given = _given(settings, facts, folder)
    start = "given" if "given" in stages else "dense"
    made: dict[str, Result] = {}
    for stage in stages:
        before = None if stage == "dense" != start else given
        made[stage] = result = _result(folder, stage, made, before, facts, settings)
        if stage == start and given:
            for name in ("name", "stage", "method", "amount", "recipe", "seeds"):
                setattr(result, name, getattr(given, name))
            continue
        if stage == "dense" and (folder / stage / "sparsity.json").exists():
            pruned = any(zeros >= PRUNED for _, zeros, _ in result.layers)
        elif stage == "dense" == start:  # of a version that did not count the zeros
            pruned = bool(result.sparsity) or _came_pruned(folder, settings)
        else:
            pruned = stage == "given"
        if pruned:
            result.name = result.method = "given model" if stage == start else "model.dense"
            result.stage = "given"
            result.dense = _dense(folder, settings, settings, facts)
        if result.stage != "dense" and stage == stages[-1] and facts.get("run"):
            result.name = str(facts["run"])  # one that nobody named is called by what was done
    return made


def _is_run(path: Path) -> bool:
    return os.path.isfile(path / "environment.json")  # also where it may not be looked at


def _came_pruned(folder: Path, settings: dict) -> bool:
    """Whether a run names the dense model of the one that it was given.

    A teacher is that model only where recover has found it so: else it may be a larger one. Where
    the weights were counted, they tell.
    """
    if (folder / "dense" / "sparsity.json").exists():
        return (folder / "given").exists()
    inputs = folder / "recover" / "inputs.json"
    taught = inputs.exists() and (_part(inputs, dict, []) or {}).get("teacher_is_dense")
    return bool((settings.get("model") or {}).get("dense") or taught)


def _located(path: str, environment: dict) -> Path:
    """A path of a job's settings: relative ones are seen from where it worked."""
    return (Path(str(environment.get("directory") or ".")) / path).resolve()


def _given(settings: dict, facts: dict, folder: Path) -> Result | None:
    """The model that a run was given, where it is what a stage of another run made."""
    path = (settings.get("model") or {}).get("path")
    place = None
    if isinstance(path, str) and path:
        place = _located(path, facts)
    if not place or place.parent == folder.resolve() or not _is_run(place.parent):
        return None
    facts = _part(place.parent / "environment.json", dict, []) or {}
    made: dict[str, Result] = {}
    with contextlib.suppress(Exception):  # damage there is not this run's
        made = _models(place.parent, facts, _settings(place.parent / "config.yaml"))
    return made.get(place.name) if place.name != "dense" else None


def _result(
    run: Path,
    stage: str,
    made: dict[str, Result],
    given: Result | None,
    environment: dict,
    settings: dict,
) -> Result:
    """Reads one stage's folder; `made` has the run's earlier stages by their folder."""
    place = run / stage
    status: list[str] = []
    recipe = _part(place / "recipe.json", dict, status) or {}
    done = _part(place / "done.json", dict, status) if (place / "done.json").exists() else None
    start = recipe.get("start")
    before = made[start] if start in made and start != "dense" else given
    # of the job that made the model, where it says so; the run's own is its last job's
    made_by = (done or {}).get("environment") or environment
    dense = before.dense if before else _dense(run, recipe, settings, made_by)
    result = Result(stage, stage, run, dense, before, status=status)
    history = json.loads(before.recipe) if before else []
    told = _by_content(recipe)
    own = {k: v for k, v in told.items() if not (before and k in ("model", "start"))}
    result.recipe = json.dumps([*history, [stage, _without_seeds(own)]], sort_keys=True)
    result.seeds = (*(before.seeds if before else ()), *_seeds(recipe))
    hash(result.seeds)  # tables look results up by them: a list is none
    if before:
        result.calibration, result.drawn = before.calibration, before.drawn
    result.environment = _job(made_by)
    if "calibration" in recipe:
        digest = _part(place / "calibration.json", dict, []) or {}
        result.calibration = _calibration((done or {}).get("calibration"), recipe["calibration"])
        result.drawn = (recipe["calibration"].get("seed"), str(digest.get("ids_sha256", "")))
    result.training = before.training if before else None
    if recover := recipe.get("recover"):
        corpus = (done or {}).get("recovery") or Path(str(recover.get("corpus"))).name
        result.training = f"{corpus} in sequences of {recover.get('length')} tokens"
    if stage not in ("dense", "given"):
        _describe(result, recipe, before)
        if done is None:
            blocks = len(list((place / "blocks").glob("*.json")))
            status.append("unfinished" + (f" after {blocks} blocks" if blocks else ""))
    weights = place
    if stage in ("dense", "given"):
        other = stage == "dense" and (run / "given").exists()
        path = dense if other else recipe.get("model", {}).get("path")
        weights = _located(path, environment) if path else place
    scores = (("perplexity.json", _perplexities), ("zeroshot.json", _tasks))
    # the scripts that score a dense model leave their results beside it
    for folder, (file, parse) in itertools.product(dict.fromkeys((place, weights)), scores):
        if (folder / file).exists():
            found = _part(folder / file, parse, status) or []
            known = [(f.kind, f.name, f.facts) for f in result.figures]
            result.figures += [f for f in found if (f.kind, f.name, f.facts) not in known]
    for figure in result.figures:
        figure.facts["calibration"] = result.calibration
    counts = None
    for path in dict.fromkeys((weights / "sparsity.json", place / "sparsity.json")):
        if path.exists():
            counts = _part(path, lambda c: _sparsity(c, result), status)
    config = _part(weights / "config.json", dict, []) or {}
    result.stored_as = str(config.get("dtype") or config.get("torch_dtype") or "")
    result.figures += _sizes(weights, result.stored_as, counts)
    if done is not None:
        result.figures += _costs(done, before, made_by)
    if stage == "recover":
        _curves(run, recipe.get("recover") or {}, done or {}, result)
    return result


def _part(path: Path, parse: Callable, troubles: list[str]):
    """What `parse` makes of a JSON file; None, and a line in `troubles`, if it cannot."""
    try:
        if path.exists() and not path.is_file():  # a pipe would keep its reader waiting
            raise UserError(f"{path} is not a file")
        return parse(read_json(path))
    except UserError:
        troubles.append(f"{path.name} cannot be read")
    except Exception:
        troubles.append(f"{path.name} is not as this version writes it")
    return None


def _settings(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except Exception:
        return {}
    return content if isinstance(content, dict) else {}


def _dense(run: Path, recipe: dict, settings: dict, environment: dict) -> str:
    """Path or hub name of the dense model; of a model that came pruned, what taught it."""
    model = recipe.get("model") or settings.get("model") or {}
    recover = recipe.get("recover") or settings.get("recover") or {}
    teacher = recover.get("teacher") if _came_pruned(run, settings) else None
    path = model.get("dense") or teacher or model.get("path") or "unknown model"
    here = _located(path, environment)
    is_model = path == model.get("path")  # which alone may have a revision
    path = str(here if here.is_dir() else Path(path))
    return f"{path}@{model['revision']}" if is_model and model.get("revision") else path


def _by_content(recipe: dict) -> dict:
    """A recipe in which models and texts stand by their checksums, not by their paths."""
    known = recipe.get(CONTENTS) or {}
    return {
        name: {k: known.get(f"{name}.{k}", v) for k, v in part.items()}
        if isinstance(part, dict)
        else part
        for name, part in recipe.items()
        if name != CONTENTS
    }


def _describe(result: Result, recipe: dict, before: Result | None) -> None:
    """Method, amount and a name from the recipe."""
    oneshot = recipe.get("oneshot")
    method, amount = (before.method, before.amount) if before else ("given model", "")
    if oneshot and (result.stage in ("oneshot", "recover") or not before):
        method = _METHODS.get(oneshot.get("method"), str(oneshot.get("method")))
        if oneshot.get("pattern") == "row" and oneshot.get("method") != "wanda":
            method += " by row"  # as Wanda always chooses
        method += " + refit" * bool(oneshot.get("refit"))
        method += " + OWL" * (oneshot.get("allocation") == "owl")
        method += " by layer" * bool(oneshot.get("layers"))
        pattern, share = str(oneshot.get("pattern")), oneshot.get("sparsity")
        amount = pattern if ":" in pattern else f"{100 * share:g} %" if share else ""
    name = f"{method} {amount}".strip()
    if result.stage != "oneshot":
        name = before.name if before else name
        added = _ADDED.get(result.stage, result.stage)
        if result.stage == "sds":
            added = _sds_name(recipe.get("sds") or {})
        if (recipe.get("reconstruct") or {}).get("inputs") == "student":
            added += " (own inputs)"  # not as published: there they are the dense model's
        method, name = f"{method} + {added}", f"{name} + {added}"
    schedule = ((recipe.get("recover") or {}).get("masks") or {}).get("schedule")
    if schedule:
        amount = [level.strip() for level in schedule.split(",") if level.strip()][-1]
        amount = amount if ":" in amount else f"{100 * float(amount):g} %"
        method += " on a schedule"
        name = f"{method} {amount}"
    result.method, result.amount, result.name = method, amount, name


def _sds_name(settings: dict) -> str:
    """SDS as it was made: as published, as far as that is known, only in mode `paper`."""
    if not settings.get("redensify", True):
        return "adjustment"
    name = "SDS" if settings.get("mode", "gram") == "paper" else "SDS (gram)"
    return name + " without adjustment" * (not settings.get("adjust", True))


def _perplexities(content: dict) -> list[Figure]:
    figures = []
    for key, entry in content["corpora"].items():
        corpus, _, extent = key.rpartition("@")  # `wikitext2@2048 first 6`
        facts = {
            "window": entry["window"],
            "windows": entry.get("windows"),
            "text": entry.get("text_sha256"),
            "BOS": entry.get("bos"),
            "limit": int(extent.rpartition(" first ")[2]) if " first " in extent else None,
            "computed in": entry.get("computed_in"),
        }
        facts |= _versions(entry, LIBRARIES[:2])
        hash(tuple(facts.values()))  # a list or a dict is no fact
        # a file that is called as a known corpus is not that corpus
        name = corpus if Path(corpus).stem in NAMES else Path(corpus).stem
        ppl = _number(entry["ppl_token"])
        figures.append(Figure("ppl", name, ppl, facts, environment=_job(entry)))
    return figures


def _tasks(content: dict) -> list[Figure]:
    figures = []
    for key, entry in content["tasks"].items():
        task = str(entry.get("task", key.partition(" first ")[0]))
        facts = {
            "items": entry.get("items"),
            "limit": entry.get("limit"),
            "shots": entry.get("shots"),
            "task version": entry.get("version"),
            "text": entry.get("rows_sha256"),
            "prompts": entry.get("prompts_sha256"),
            "tokenizer": entry.get("tokenizer"),
            "computed in": entry.get("computed_in"),
        }
        facts |= _versions(entry, LIBRARIES)
        hash(tuple(facts.values()))
        for kind, metric in _METRICS.items():
            if entry.get(metric) is not None:
                error = entry.get(f"{metric}_stderr")
                error = None if error is None else _number(error)
                figure = Figure(kind, task, _number(entry[metric]), dict(facts), error)
                figure.environment = _job(entry)
                figures.append(figure)
    return figures


def _number(value) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{value} is not a figure")
    return number


def _versions(entry: dict, names: tuple[str, ...]) -> dict:
    """Versions of the libraries that computed a figure."""
    own = entry.get("versions") or {}
    return {name: _release(own.get(name)) for name in names}


def _release(version: str | None) -> str | None:
    """2.13.0 of 2.13.0+cpu: the build for a device is the same release."""
    return version.partition("+")[0] if isinstance(version, str) else None


def _calibration(told: str | None, settings: dict) -> str:
    """The calibration text as a fact, without its seed: what the stage says that it read.

    A corpus by name, as in the settings, may be the hub's or a sample of it.
    """
    if told:
        return " ".join(re.sub(r", seed \d+$", "", told).split())
    corpus = Path(str(settings.get("corpus"))).name
    return f"{settings.get('sequences')} x {settings.get('length')} tokens of {corpus}"


def _job(environment: dict) -> dict[str, str]:
    """Command, directory, versions and machine of a job, as they are printed."""
    versions = [f"{k} {v}" for k, v in (environment.get("versions") or {}).items() if v]
    versions += [f"commit {environment['commit']}"] if environment.get("commit") else []
    hardware = environment.get("hardware") or {}
    machine = _machine(hardware) if hardware else "unknown"
    on_cpus = hardware and not hardware.get("cuda")
    machine += (
        f", {hardware.get('ranks')} ranks" if on_cpus and hardware.get("ranks", 1) > 1 else ""
    )
    told = {
        name: str(environment[name]) for name in ("command", "directory") if name in environment
    }
    return told | {"versions": ", ".join(versions) or "unknown", "machine": machine}


def _machine(hardware: dict) -> str:
    """What times and memory depend on. Ranks on CPUs share a node's cores, one on a GPU has it."""
    nodes, cards = hardware.get("nodes") or 1, hardware.get("cuda") or []
    text = f"{nodes} nodes of " if nodes > 1 else ""
    text += f"{hardware.get('cores')} cores of {hardware.get('processor')}"
    return text + (f", {hardware.get('ranks') or 1} x {cards[0]}" if cards else "")


def _sparsity(content: dict, result: Result) -> dict:
    """Fills in sparsity and layers; returns the number of bytes that packing needs to know.

    A second count, of the weights as they are, keeps the errors of those that have not changed.
    """
    pruned, whole = content["pruned_matrices"], content["whole_model"]
    known = {layer[:2]: layer[2] for layer in result.layers}
    result.sparsity, result.layers = None, []
    if content["rows"] or result.stage != "dense":
        result.sparsity = (_number(pruned["sparsity"]), _number(whole["sparsity"]))
    mask_bytes = 0
    for row in content["rows"]:
        n_rows, columns = row["shape"]
        layer = (str(row["name"]), row["zeros"] / (n_rows * columns))
        error = known.get(layer) if row.get("error") is None else float(row["error"])
        result.layers.append((*layer, error))
        mask_bytes += n_rows * -(-columns // 8)
    return {"zeros": pruned["zeros"], "mask_bytes": mask_bytes}


def _sizes(folder: Path, stored_as: str, counts: dict | None) -> list[Figure]:
    """Bytes of the model's files as they are, and with the pruned matrices bit-packed.

    Bit-packed, a matrix is its non-zero values and one bit a weight that says where they stand.
    """
    n_bytes = sum(f.stat().st_size for f in weight_files(folder))
    if not n_bytes:
        return []
    figures = [Figure("on disk", "", n_bytes)]
    if counts and stored_as in _BYTES:
        packed = n_bytes - _BYTES[stored_as] * counts["zeros"] + counts["mask_bytes"]
        figures.append(Figure("bit-packed", "", packed))
    return figures


def _costs(done: dict, before: Result | None, environment: dict) -> list[Figure]:
    """What making the model took, all stages up to it together."""
    machine = _machine(environment.get("hardware") or {})
    earlier = {f.kind: f.value for f in before.figures} if before else {}
    for f in before.figures_of("time") if before else ():
        if f.facts["machine"] != machine:
            machine = f"{f.facts['machine']}, then {machine}"
    figures = []
    if done.get("seconds") is not None and (before is None or "time" in earlier):
        seconds = done["seconds"] + earlier.get("time", 0.0)
        figures.append(Figure("time", "", seconds, {"machine": machine}))
    if done.get("peak_memory_bytes"):
        peak = max(done["peak_memory_bytes"], earlier.get("peak memory", 0))
        figures.append(Figure("peak memory", "", peak, {"machine": machine}))
    if done.get("peak_cuda_bytes"):
        peak = max(done["peak_cuda_bytes"], earlier.get("GPU memory", 0))
        figures.append(Figure("GPU memory", "", peak, {"machine": machine}))
    if done.get("tokens") or "trained" in earlier:
        figures.append(Figure("trained", "", (done.get("tokens") or 0) + earlier.get("trained", 0)))
    return figures


def _curves(run: Path, recover: dict, done: dict, result: Result) -> None:
    """Held-out perplexity over tokens, a line a level, from `metrics.jsonl`."""
    each = (recover.get("optimizer") or {}).get("batch", 0) * (recover.get("length") or 0)
    levels: dict[str, dict[int, float]] = {}
    try:
        for entry in read_metrics(run):
            if entry["name"] == "held_out_ppl" and re.fullmatch(r"recover(/\d+)?", entry["stage"]):
                points = levels.setdefault(entry["stage"], {})
                # a job that went back to a checkpoint, or began anew, writes steps again
                for step in [s for s in points if s >= entry["step"]]:
                    del points[step]
                points[entry["step"]] = float(entry["value"])
    except Exception:
        result.status.append("metrics.jsonl cannot be read")
    start = 0
    for points in levels.values():
        result.curve.append([(start + s * each, points[s]) for s in sorted(points)])
        start += max(points) * each
    for level in done.get("levels") or []:
        if level.get("dense_held_out_ppl") is not None:
            result.curve_dense = float(level["dense_held_out_ppl"])


def _without_seeds(settings):
    if not isinstance(settings, dict):
        return settings
    return {k: _without_seeds(v) for k, v in settings.items() if k != "seed"}


def _seeds(settings: dict) -> tuple[int, ...]:
    seeds = []
    for key, value in settings.items():
        if key == "seed":
            seeds.append(value)
        elif isinstance(value, dict):
            seeds += _seeds(value)
    return tuple(seeds)

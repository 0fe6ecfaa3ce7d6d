"""What every file of scores says besides them, and which of its scores still count."""

from __future__ import annotations

from pathlib import Path

from cap_llm.models.directory import ModelDirectory
from cap_llm.runtime.console import Console
from cap_llm.runtime.environment import environment
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.files import read_json
from cap_llm.runtime.world import World

_JOB = ("command", "directory", "versions", "commit", "hardware")  # of `environment`


def facts_of(directory: ModelDirectory, model: str, world: World) -> dict:
    """Which model a directory holds, by name and weights, and who scores it on what."""
    weights = world.decide(lambda: directory.weights_digest)
    return {"model": model, "weights_sha256": weights} | environment(world)


def job(facts: dict) -> dict:
    """What an entry keeps of the job that scored it: a later job may add to the same file."""
    return {name: facts[name] for name in _JOB if name in facts}


def earlier(
    path: Path | None, parts: tuple[str, ...], facts: dict, world: World, console: Console
) -> dict[str, dict[str, dict]]:
    """The entries that a file of scores holds of the weights that `facts` names, for each part.

    As the first rank sees it: a shared file system may show ranks different things.

    Raises:
        UserError: it is another kind of file.
    """
    return world.decide(lambda: _read(path, parts, facts, console))


def _read(
    path: Path | None, parts: tuple[str, ...], facts: dict, console: Console
) -> dict[str, dict[str, dict]]:
    nothing: dict[str, dict] = {part: {} for part in parts}
    if path is None or not path.exists():
        return nothing
    content = read_json(path)
    try:
        found = {part: {k: dict(v) for k, v in content[part].items()} for part in parts}
        if content["weights_sha256"] == facts["weights_sha256"]:
            return found
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} holds no scores as this version writes them; remove it") from None
    console.say(f"{path} scores other weights; it will be written anew")
    return nothing

"""`cap-llm push`: uploads a finished model directory and its card to the Hugging Face hub."""

from __future__ import annotations

import contextlib
from pathlib import Path

import cap_llm
from cap_llm.cli.options import make_parser, parse
from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError, one_line
from cap_llm.runtime.files import holding, read_json, verify

_EXAMPLES = (
    "runs/opt/oneshot my-name/opt-125m-50",
    "runs/opt/recover my-name/opt-125m-50-recovered",
    "runs/opt/recover my-name/opt-125m-50-recovered --public",
)
_MORE = """DIR is the folder of a finished stage. Weights, masks, configuration, tokenizer,
sparsity.json and the card (README.md) are uploaded; records of the run, which hold paths, are not.
Log in first with `hf auth login`, or set HF_TOKEN."""


def main(argv: list[str], console: Console) -> None:
    """Checks the directory and uploads it.

    Raises:
        UserError: the directory is not a finished model, has changed, or cannot be uploaded.
    """
    what = "Upload a finished model and its card to the Hugging Face hub."
    parser = make_parser("push", what, _EXAMPLES, _MORE)
    parser.add_argument("folder", metavar="DIR", type=Path, help="the folder of a finished stage")
    parser.add_argument("repo", metavar="REPO", help="the repository: NAME/MODEL")
    public = parser.add_argument("--public", action="store_true")
    public.help = "create a repository that everyone can read; default: a private one"
    args = parse(parser, argv)
    files = finished_files(args.folder.resolve())
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        # an existing repository stays as private or public as it is
        hub.create_repo(args.repo, private=not args.public, exist_ok=True)
        console.say(f"uploading {len(files)} files to {args.repo}")
        commit = hub.upload_folder(
            repo_id=args.repo,
            folder_path=args.folder,
            allow_patterns=files,
            commit_message=f"Upload a model pruned with cap_llm {cap_llm.__version__}",
        )
    except Exception as error:  # of the hub's library, of the network
        why = one_line(error)
        raise UserError(
            f"{args.folder} could not be uploaded to {args.repo}: {why}. Check the repository's "
            "name, the network, and the login (hf auth login)."
        ) from None
    console.say(f"uploaded: {commit}", loud=True)


def finished_files(folder: Path) -> list[str]:
    """The files of a finished, unchanged model directory that may be published, by name.

    Raises:
        UserError: the stage is not finished, a file has changed since, or there is no card.
    """
    from cap_llm.models.files import side_files, weight_files
    from cap_llm.report.card import FILE, write_cards

    if not (folder / "done.json").is_file():
        raise UserError(
            f"{folder} is not the folder of a finished stage (done.json is missing). Finish the "
            "run, or name one of its stages, such as RUN/oneshot."
        )
    files = read_json(folder / "done.json", holding(files=dict))["files"]
    if changed := verify(folder, files):
        raise UserError(f"{folder / changed}. Restore the file, or delete {folder} and rerun.")
    if not weight_files(folder) or not (folder / "sparsity.json").is_file():
        raise UserError(f"{folder} does not hold a pruned model. Name a stage that has weights.")
    with contextlib.suppress(UserError):  # the folder was moved out of its run, with its card
        write_cards(folder.parent)
    if not (folder / FILE).is_file():
        raise UserError(f"{folder} has no model card ({FILE}). Rerun the command that made it.")
    return sorted({*files, *(path.name for path in side_files(folder)), "sparsity.json", FILE})

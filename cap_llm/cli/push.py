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
_MORE = """DIR is the folder of a finished stage. The upload contains weights, masks, configuration,
tokenizer, sparsity.json and the card (README.md), but no run records, because they contain paths.
Log in first with `hf auth login`, or set HF_TOKEN."""


def main(argv: list[str], console: Console) -> None:
    """Checks the directory and uploads it.

    Raises:
        UserError: the directory is not a finished, unchanged model, or the upload fails.
    """
    what = "Upload a finished model and its card to the Hugging Face hub."
    parser = make_parser("push", what, _EXAMPLES, _MORE)
    parser.add_argument("folder", metavar="DIR", type=Path, help="the folder of a finished stage")
    parser.add_argument("repo", metavar="REPO", help="the repository: NAME/MODEL")
    public = parser.add_argument("--public", action="store_true")
    public.help = "create a public repository; default: private"
    args = parse(parser, argv)
    files = finished_files(args.folder.resolve())
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        # The visibility of an existing repository does not change.
        hub.create_repo(args.repo, private=not args.public, exist_ok=True)
        console.say(f"Uploading {len(files)} files to {args.repo}...")
        commit = hub.upload_folder(
            repo_id=args.repo,
            folder_path=args.folder,
            allow_patterns=files,
            commit_message=f"Upload a model pruned with cap_llm {cap_llm.__version__}",
        )
    except Exception as error:  # from the hub's library or the network
        raise UserError(
            f"{args.folder} could not be uploaded to {args.repo}: {one_line(error)}. Check the "
            "repository's name, the network, and the login (hf auth login)."
        ) from None
    console.say(f"uploaded: {commit}", loud=True)


def finished_files(folder: Path) -> list[str]:
    """The names of a finished model directory's files to publish.

    Raises:
        UserError: the stage is not finished, a file has changed, or the card is missing.
    """
    from cap_llm.models.files import side_files, weight_files
    from cap_llm.report.card import FILE, write_cards

    if not (folder / "done.json").is_file():
        raise UserError(
            f"{folder} is not a finished stage (done.json is missing). Finish the run, or pass one "
            "of its stages, such as RUN/oneshot."
        )
    files = read_json(folder / "done.json", holding(files=dict))["files"]
    if changed := verify(folder, files):
        raise UserError(f"{folder / changed}. Restore the file, or delete {folder} and rerun.")
    if not weight_files(folder) or not (folder / "sparsity.json").is_file():
        raise UserError(f"{folder} does not contain a pruned model. Pass a stage with weights.")
    with contextlib.suppress(UserError):  # the folder may have been moved out of its run
        write_cards(folder.parent)
    if not (folder / FILE).is_file():
        raise UserError(f"{folder} has no model card ({FILE}). Rerun the command that made it.")
    return sorted({*files, *(path.name for path in side_files(folder)), "sparsity.json", FILE})

"""Data sets on the Hugging Face hub: a source's `hub` is fetched once, to where its `path` says, and read from there ever after.

Nothing else in the pipeline asks the hub for anything. What was fetched counts by its content, as every source does, so a
data set that changes on the hub changes no run whose file is there. It leaves out splits and configs: a file is a file.
"""

import re
import shutil
from pathlib import Path, PurePosixPath

from pipeline.store import publish
from schemas.errors import UserError
from schemas.recipe import FileSource

KINDS = (".parquet", ".jsonl", ".csv")
_PARTS = re.compile(r"(?P<repo>[^/@]+/[^/@]+)(?:/(?P<file>[^@]+))?(?:@(?P<revision>.+))?")


def fetch(source: FileSource) -> None:
    """Makes `source.path` be there if the source names the hub. UserError with the way out if it cannot."""
    if source.hub is None or source.path.exists():
        return
    match = _PARTS.fullmatch(source.hub)
    assert match is not None, "the recipe has checked it"
    repo, file, revision = match["repo"], match["file"], match["revision"]
    where = f"source '{source.name}': hub = '{source.hub}'"
    from huggingface_hub import HfApi, hf_hub_download

    try:
        if file is None:
            listed = HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)
            file = _only(where, repo, [name for name in listed if name.endswith(KINDS)])
        _refuse_another_kind(where, source.path, file)
        found = hf_hub_download(repo, file, repo_type="dataset", revision=revision)
    except UserError:
        raise
    except Exception as e:  # httpx's, the hub's own, or of the disk: told as what they are
        reason = " ".join(str(e).split())[:300]
        raise UserError(
            f"{where}: could not be fetched ({type(e).__name__}: {reason}). A gated data set wants its terms accepted on its page, and "
            f"a token (`hf auth login`, or HF_TOKEN). Or put the file at {source.path} yourself"
        ) from None
    source.path.parent.mkdir(parents=True, exist_ok=True)
    publish(source.path, lambda target: shutil.copyfile(found, target))


def _only(where: str, repo: str, files: list[str]) -> str:
    if len(files) != 1:
        have = ", ".join(sorted(files)[:20]) or "none"
        raise UserError(
            f"{where}: expected a data set with one {', '.join(KINDS)} file, found {len(files)}: {have}. Name one: hub = '{repo}/FILE'"
        )
    return files[0]


def _refuse_another_kind(where: str, path: Path, file: str) -> None:
    if PurePosixPath(file).suffix != path.suffix:
        raise UserError(f"{where}: {file} would be fetched to {path}. Expected the same extension: correct `path`")

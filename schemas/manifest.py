"""The manifest of a partition: written last, so that its existence means complete."""

from pydantic import BaseModel, ConfigDict

from schemas.columns import SCHEMA_VERSION
from schemas.ids import digest


class Part(BaseModel):
    """One file: its name in the partition's folder, rows (0 for files that are no tables), bytes, sha256 (hex).

    schema_version: of this file, which may be older than the manifest; manifests of version 1 do not say it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    rows: int
    bytes: int
    sha256: str
    schema_version: int = 1


class Manifest(BaseModel):
    """What made a partition and what is in it.

    `fingerprint` hashes the stage's version, its slice of the recipe, its parents and the seed: what each row depends on.
    `rows_digest` hashes the sorted row keys and contents: raising k adds rows and leaves the fingerprint alone.
    `identity` is both, and is what a stage that aggregates (grade, route, train) names as its parent.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    table: str
    keys: dict[str, str | int]
    stage: str
    fingerprint: str
    config: dict
    parents: dict[str, str]
    parts: list[Part]
    rows: int
    rows_digest: str
    seed: int
    schema_version: int = SCHEMA_VERSION
    code: str
    created: str
    failed: int = 0
    facts: dict = {}

    @property
    def identity(self) -> str:
        return digest([self.fingerprint, self.rows_digest])

"""One undisturbed small run, made once by the real command, that the end-to-end tests compare with or copy."""

import shutil
from pathlib import Path

import pytest

from tests.tiny_runs import dypo, write_recipe


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a whole `dypo run`. Read-only by agreement: copy it before you change it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    dypo("run", write_recipe(folder))
    return folder / "run"


@pytest.fixture
def a_copy(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of the undisturbed run that a test may harm."""
    shutil.copytree(undisturbed, tmp_path / "run")
    recipe = (tmp_path / "run" / "recipe.toml").read_text()
    (tmp_path / "run" / "recipe.toml").write_text(recipe.replace(str(undisturbed), str(tmp_path / "run")))
    return tmp_path / "run"

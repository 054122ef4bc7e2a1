"""The light layer stays light, and the folders on disk are the packages that are imported."""

import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from tests.tiny_runs import ROOT

HEAVY = ("torch", "transformers", "vllm", "duckdb", "polars", "pyarrow", "matplotlib")


def loaded(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded after `code`."""
    probe = f"import sys\n{code}\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
    return set(
        subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    )


def test_help_loads_nothing_heavy() -> None:
    run = "from typer.testing import CliRunner; from pipeline.cli import app; assert CliRunner().invoke(app, ['--help']).exit_code == 0"
    assert loaded(run) == set()


def test_schemas_load_neither_torch_nor_duckdb() -> None:
    assert loaded("import schemas.tables, schemas.recipe, schemas.manifest") == {"pyarrow"}


def test_the_stages_load_no_torch_until_they_need_it() -> None:
    assert not loaded(
        "import pipeline.flow, pipeline.plan, pipeline.sizes, pipeline.store, pipeline.engines.hf, pipeline.report"
    ) & {
        "torch",
        "vllm",
    }


def test_the_packages_are_ours_and_not_those_of_another_distribution() -> None:
    import pipeline
    import schemas
    import trainer

    for package in (schemas, pipeline, trainer):
        assert list(package.__path__) == [str(ROOT / package.__name__)]
        assert set(packages_distributions().get(package.__name__, ["dypo"])) == {"dypo"}


def test_no_source_file_names_a_path_of_a_machine_or_loads_pickles() -> None:
    words = (f"{ROOT}/", f"{Path.home()}/", "trust_remote_code=True", "import pickle", "torch.load(")
    for path in [p for d in ("schemas", "pipeline", "trainer", "recipes", "data", "docs") for p in (ROOT / d).rglob("*")]:
        if path.suffix in (".py", ".toml", ".sql", ".md"):
            text = path.read_text()
            assert not [w for w in words if w in text], path


def test_every_query_file_is_one_select_with_a_header() -> None:
    import duckdb

    for path in sorted((ROOT / "pipeline" / "sql").rglob("*.sql")):
        text = path.read_text()
        assert text.startswith("-- "), path
        assert "grain:" in text.split("\n\n")[0], path
        assert not text.rstrip().endswith(";"), path
        statements = duckdb.connect().extract_statements(text)
        assert [s.type.name for s in statements] == ["SELECT"], path


def test_the_readme_names_every_folder(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    for folder in ("schemas/", "pipeline/", "trainer/", "data/", "recipes/", "tests/", "docs/"):
        assert folder in readme

"""The digest of a reward's code changes with the code that would run, and with nothing else."""

import importlib.metadata
import shutil
from pathlib import Path

import pytest

from rltrain.reward.source import source_digest, source_files


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "rewards"
    (place / "helpers" / "deep").mkdir(parents=True)
    (place / "mine.py").write_text(
        "import json\nfrom helpers import tables\nfrom helpers.deep.inner import x\n\ndef f(inputs): ...\n"
    )
    (place / "helpers" / "__init__.py").write_text("")
    (place / "helpers" / "tables.py").write_text("from .words import WORDS\nimport single\n")
    (place / "helpers" / "words.py").write_text("WORDS = 3\n")
    (place / "helpers" / "deep" / "inner.py").write_text("from .. import tables\nx = 1\n")
    (place / "single.py").write_text("import mine\n")
    (place / "unrelated.py").write_text("y = 1\n")
    return place


def digest(folder: Path) -> str:
    return source_digest(f"{folder}/mine.py:f")


@pytest.mark.parametrize(
    "name",
    [
        "mine.py",
        "helpers/__init__.py",
        "helpers/tables.py",
        "helpers/words.py",
        "helpers/deep/inner.py",
        "single.py",
    ],
)
def test_the_digest_changes_with_every_file_that_the_function_runs(folder, name):
    before = digest(folder)
    with (folder / name).open("a") as file:
        file.write("# changed\n")
    assert digest(folder) != before


def test_the_digest_is_the_same_elsewhere_and_ignores_files_that_are_not_imported(
    folder, tmp_path, monkeypatch
):
    before = digest(folder)
    (folder / "unrelated.py").write_text("y = 2\n")
    assert digest(folder) == before
    shutil.copytree(folder, tmp_path / "copy")
    assert digest(tmp_path / "copy") == before
    monkeypatch.chdir(folder)
    assert source_digest("mine.py:f") == before == source_digest("mine.py:g")


def test_text_that_moves_from_one_file_to_another_changes_the_digest(folder):
    before = digest(folder)
    single = folder / "single.py"
    words = folder / "helpers" / "words.py"
    single_text = single.read_text()
    words_text = words.read_text()
    single.write_text(words_text)
    words.write_text(single_text)
    assert digest(folder) != before


def test_files_are_listed_once_and_a_file_that_does_not_parse_stands_alone(folder):
    files = source_files(folder / "mine.py")
    assert len(files) == len(set(files)) == 6
    (folder / "mine.py").write_text("from ............ import far\n")
    assert source_files(folder / "mine.py") == [folder / "mine.py"]
    (folder / "mine.py").write_text("def f(:\n")
    assert source_files(folder / "mine.py") == [folder / "mine.py"]


def test_a_registered_name_has_the_version_of_the_package_and_a_missing_file_is_an_error(tmp_path):
    assert source_digest("exact") == f"rltrain {importlib.metadata.version('rltrain')}"
    with pytest.raises(ValueError, match=r"gone\.py cannot be read: No such file"):
        source_digest(f"{tmp_path}/gone.py:f")

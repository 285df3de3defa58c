"""scripts/get_data.py on the real files: from a folder, all of them are those measured in docs/studies."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from support.scripts import script

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the real data in {DATA}")


@pytest.fixture(scope="module")
def get_data() -> ModuleType:
    return script("get_data")


def test_the_files_of_a_folder_are_taken_as_they_are(
    get_data: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    get_data.main(["all", "--from", str(DATA), "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all(line.endswith("rows, those measured in docs/studies") for line in lines)
    for name in get_data.STUDIED:
        for file in get_data.DATA_SETS[name]:
            kept, original = (
                get_data.json_lines((root / file.path).read_text()) for root in (tmp_path, DATA)
            )
            assert kept == original


def test_the_manifest_lists_the_rows_of_the_real_files(get_data: ModuleType) -> None:
    entries = get_data.json.loads(get_data.MANIFEST.read_text())
    for path, entry in entries.items():
        if "rows" in entry and path != "process/step_labelled.jsonl":
            rows = get_data.json_lines((DATA / path).read_text())
            assert get_data.select(rows, entry, path) == rows

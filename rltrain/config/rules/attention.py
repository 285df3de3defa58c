"""Attention kernels that a model's architecture lacks, told without loading it.

transformers says in the source of each architecture which kernels it has. The source is read as text, since
importing it takes seconds.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from rltrain.config.model_config import config_path
from rltrain.config.schema import AnyRecipe
from rltrain.json_text import parse_json

__all__ = ["attention_problems", "lacks_kernel"]

_FLAGS = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}
_BASE = re.compile(r"^class \w+\((?:\w+, )*PreTrainedModel\b", re.MULTILINE)  # whose kernels are none


def attention_problems(recipe: AnyRecipe) -> Iterator[str]:
    """The recipe's attention kernel, where its model's config.json is on this machine and names an
    architecture of transformers without it.
    """
    model = recipe.model
    path = config_path(model.path, model.revision)
    try:
        facts = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    kind = facts.get("model_type") if isinstance(facts, dict) else None
    if isinstance(kind, str) and "auto_map" not in facts and lacks_kernel(kind, model.attention):
        yield (
            f"model.attention is {model.attention}, but transformers has no such kernel for {model.path} "
            f"({kind}); set it to auto, which takes one that the model has"
        )


def lacks_kernel(kind: str, attention: str) -> bool:
    """Whether transformers' architecture ``kind`` (a model_type) is known to have no such kernel."""
    flag = _FLAGS.get(attention)
    source = None if flag is None else _source(kind)
    if flag is None or source is None:
        return False
    values = set(re.findall(rf"^    {flag}(?:_2)? = (True|False)", source, re.MULTILINE))
    return values == {"False"} or (not values and _BASE.search(source) is not None)


@functools.cache
def _source(kind: str) -> str | None:
    """The text of the architecture's module; None where transformers has none of that name."""
    spec = find_spec("transformers")  # finds the package without importing it
    if spec is None or spec.origin is None or not kind.isidentifier():
        return None
    name = kind.removesuffix("_text")
    path = Path(spec.origin).parent / "models" / name / f"modeling_{name}.py"
    return path.read_text(encoding="utf-8") if path.is_file() else None

"""Loads recipes: merges what a recipe extends, the recipe, profile and ``--set`` in that order and checks the
result against the schema.

``extends`` is a path relative to the file that contains it, or the name of a shipped recipe (``dapo``). The
extended file may extend another.

Mappings are merged key by key; lists and single values are replaced. A mapping with a different identity
(``name`` of a method, ``path`` of a model, ``train`` of a data set) replaces the lower mapping as a whole, so
that hyperparameters of one method or columns of one data set never reach another.

A user's ``file.py:name`` is relative to the folder of the recipe or base that contains it. In a profile,
which several recipes share, and in ``--set`` it is relative to the current folder. Loading makes it absolute.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rltrain.config.explain import explain
from rltrain.config.schema import (
    RECIPES,
    SUPERVISED_LOSS,
    AnyRecipe,
    OfflineRecipe,
    OfflineReport,
    OnlineRecipe,
    Section,
)
from rltrain.config.shipped import RECIPES_FOLDER, find_recipe, is_recipe_name, recipe_file
from rltrain.config.user_files import (
    absolute_name,
    drop_digest,
    method_places,
    with_absolute_names,
    with_digests,
)
from rltrain.config.yaml12 import Document, KeyPath, dump, parse_value, read
from rltrain.errors import RecipeError
from rltrain.registry import suggestion

# The only keys that a profile may replace: model, data and sizes.
PROFILE_KEYS = (
    "model",
    "data",
    "rollout.engine",
    "rollout.prompts",
    "rollout.n",
    "rollout.max_tokens",
    "rollout.max_rows",
    "rollout.vllm",
    "reward.workers",
    "reward.seconds",
    "reward.memory_gib",
    "learner.optimizer.lr",  # depends on the size of the model
    "learner.optimizer.warmup_steps",
    "learner.tokens_per_micro_batch",
    "learner.layout",
    "learner.precision",
    "learner.gradient_checkpointing",
    "learner.head_chunk",
    "learner.kernels",
    "process_reward.optimizer.lr",  # the same for the process reward model, if the recipe trains one
    "process_reward.optimizer.warmup_steps",
    "train",
    "eval.every",
    "eval.prompts",
    "eval.n",
    "eval.k",
    "eval.temperature",
    "eval.top_p",
    "checkpoint",
    "report",
)
OFFLINE_KEY = "offline"  # section of a profile for recipes that learn from a data set of judged completions
PREFERENCE_KEY = "preference"  # key under ``loss`` of a loss that compares completions
# what the section ``offline`` of a profile may set
OFFLINE_PROFILE_KEYS = ("data", "learner", "train", "eval", "reference.cache")
# section of a profile: overrides by name of the environment, for recipes whose completions are episodes
ENVIRONMENTS_KEY = "environments"
# sections of a profile that recipes of both kinds read
_SHARED_SECTIONS = ("model", "learner", "checkpoint", "report")
_TRAIN = "data.train="  # as overrides
_OPTIONS = "data.options"
_POSITION_DIGITS = 6  # of a position in a list
_IDENTITY_KEYS = ("name", "path", "train")
# they belong to the training method, so that another data set does not reset the order of the prompts (beside
# ``train``), nor another model the adapter (beside ``path``)
_METHOD_KEYS = {"train": "order", "path": "adapter"}


def load_recipe(path: str | Path, *, profile: str | None = None, overrides: Sequence[str] = ()) -> AnyRecipe:
    """The recipe at ``path``, or the shipped recipe of that name, under a profile (a name or a file) and
    ``--set`` overrides.

    Raises RecipeError with every problem.
    """
    path = recipe_file(path)
    layers = [with_absolute_files(layer, Path(layer.source).parent) for layer in recipe_layers(read(path))]

    data: dict[str, Any] = {}
    for layer in layers:
        data = merge_mappings(data, layer.data)

    if profile is not None:
        document = with_absolute_files(read_profile(find_profile(profile, path)), Path.cwd())
        layers.append(drop_unused_process_reward(profile_layer(document, schema_of(data)), data))
        data = merge_mappings(data, layers[-1].data)
        if (environment := environment_of(data)) is not None:
            data["rollout"]["environment"] = environment
            layers.append(environment_layer(document, environment["name"]))
            data = merge_mappings(data, layers[-1].data)
        data = with_sizes(data, document.data.get("sizes", {}))

    has_options = any(override.startswith(_OPTIONS) for override in overrides)
    for override in overrides:
        before = data.get("data")
        data, document = with_override(data, override)
        layers.append(document)
        if override.startswith(_TRAIN) and not has_options:
            data = without_options(data, before)
    return validate_recipe(with_digests(_with_supervised_loss(data)), layers, str(path))


def _with_supervised_loss(data: dict[str, Any]) -> dict[str, Any]:
    """``data`` with the loss of kind sft where it names none."""
    if data.get("kind") != "sft" or "loss" in data:
        return data
    return {**data, "loss": {PREFERENCE_KEY: SUPERVISED_LOSS}}


def without_options(data: dict[str, Any], before: Any) -> dict[str, Any]:
    """``data`` without ``data.options`` where another data set than in the section ``before`` is named: the
    options are those of the built-in task that stood there.
    """
    section = data["data"]
    if isinstance(before, Mapping) and before.get("train") == section.get("train"):
        return data
    return {**data, "data": {key: value for key, value in section.items() if key != "options"}}


def resolved_yaml(recipe: Section) -> str:
    """Every key of the recipe, as text that ``load_recipe`` reads back as an equal recipe."""
    return dump(recipe.model_dump(mode="json"))


def schema_of(data: Mapping[str, Any]) -> type[AnyRecipe]:
    """The schema that ``kind`` names; without it, ``offline`` for a recipe with ``loss.preference``,
    else ``online``.
    """
    loss = data.get("loss")
    inferred = OFFLINE_KEY if isinstance(loss, dict) and PREFERENCE_KEY in loss else "online"
    return RECIPES.get(str(data.get("kind", inferred)), OnlineRecipe)


def validate_recipe(data: Mapping[str, Any], layers: Sequence[Document], source: str) -> AnyRecipe:
    """``data`` as a recipe of its kind. Types are strict: ``"200"`` is no number and ``off`` no boolean."""
    schema = schema_of(data)
    kind = data.get("kind")
    if kind is not None and (not isinstance(kind, str) or kind not in RECIPES):
        raise RecipeError(f"{source}: no kind of recipe is called {kind!r}{suggestion(kind, RECIPES)}")
    try:
        # JSON mode accepts lists as tuples, Python mode does not.
        return schema.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise RecipeError(explain(error, layers, source, root=schema)) from error


def profile_layer(profile: Document, schema: type[AnyRecipe]) -> Document:
    """The part of a profile that applies to recipes of a kind. Offline recipes take the section ``offline``,
    merged over the sections that both kinds share.
    """
    if schema is not OfflineRecipe:
        kept = {
            key: value
            for key, value in profile.data.items()
            if key not in ("sizes", OFFLINE_KEY, ENVIRONMENTS_KEY)
        }
        return Document(profile.source, kept, profile.lines)
    shared = {key: value for key, value in profile.data.items() if key in _SHARED_SECTIONS}
    if "report" in shared:
        shared["report"] = {
            key: value for key, value in shared["report"].items() if key in OfflineReport.model_fields
        }
    offline_section = profile.data.get(OFFLINE_KEY, {})
    lines = {key: line for key, line in profile.lines.items() if key[0] in _SHARED_SECTIONS}
    return Document(
        profile.source,
        merge_mappings(shared, offline_section),
        lines | {key[1:]: line for key, line in profile.lines.items() if key[0] == OFFLINE_KEY},
    )


def drop_unused_process_reward(layer: Document, recipe: Mapping[str, Any]) -> Document:
    """The layer of a profile without ``process_reward`` if the recipe trains no process reward model; the
    section would add one.
    """
    if recipe.get("process_reward") is not None:
        return layer
    kept = {key: value for key, value in layer.data.items() if key != "process_reward"}
    return Document(
        layer.source, kept, {key: line for key, line in layer.lines.items() if key[:1] != ("process_reward",)}
    )


def environment_of(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """The recipe's environment as a mapping with a name; None if it is missing or the schema refuses it."""
    rollout = data.get("rollout")
    setting = rollout.get("environment") if isinstance(rollout, dict) else None
    environment = {"name": setting} if isinstance(setting, str) else setting
    return (
        dict(environment)
        if isinstance(environment, dict) and isinstance(environment.get("name"), str)
        else None
    )


def environment_layer(profile: Document, name: str) -> Document:
    """What a profile sets only for recipes with the environment ``name``."""
    name_in_profile = next(
        (key for key in profile.data.get(ENVIRONMENTS_KEY, {}) if absolute_name(key, Path.cwd()) == name),
        name,
    )
    section = (ENVIRONMENTS_KEY, name_in_profile)
    kept = profile.data.get(ENVIRONMENTS_KEY, {}).get(name_in_profile, {})
    return Document(
        profile.source,
        kept,
        {key[2:]: line for key, line in profile.lines.items() if key[:2] == section and len(key) > 2},
    )


def recipe_of_model(
    model: str, *, engine: str, max_prompt_tokens: int, max_tokens: int, seed: int
) -> OnlineRecipe:
    """A recipe for sampling from a model; the keys that only training needs hold the simplest valid values.

    Raises RecipeError.
    """
    data = {
        "seed": seed,
        "model": {"path": model},
        "data": {"train": "arithmetic", "max_prompt_tokens": max_prompt_tokens},
        "rollout": {"engine": engine, "prompts": 1, "n": 1, "max_tokens": max_tokens},
        "reward": {"functions": ["exact"]},
        "advantage": "group_norm",
        "loss": {"policy": "reinforce"},
        "learner": {"optimizer": {"lr": 0.0}},
        "train": {"steps": 1},
    }
    return OnlineRecipe.model_validate(data)


def with_absolute_files(layer: Document, folder: Path) -> Document:
    """``layer`` with the paths of users' files made absolute, starting from ``folder``."""
    return Document(layer.source, with_absolute_names(layer.data, folder.absolute()), layer.lines)


# layers -----------------------------------------------------------------------------------------------------


def recipe_layers(recipe: Document, extending: tuple[Path, ...] = ()) -> list[Document]:
    """What the recipe extends, lowest first, and then the recipe itself, all without ``extends``.

    extending: the files on the way from the recipe that was asked for to this one.
    """
    if "sizes" in recipe.data:
        raise RecipeError(
            f"{recipe.location_of(('sizes',))}: sizes belongs in a profile (--profile NAME), this file is "
            "read as a recipe"
        )
    own_layer = Document(
        recipe.source, {key: value for key, value in recipe.data.items() if key != "extends"}, recipe.lines
    )
    if "extends" not in recipe.data:
        return [own_layer]

    extends = recipe.data["extends"]
    where = recipe.location_of(("extends",))
    if not isinstance(extends, str):
        raise RecipeError(
            f"{where}: extends must be the path of one recipe or base, relative to this file, or the name "
            f"of a shipped recipe, got {extends!r}"
        )
    chain = (*extending, Path(recipe.source))
    try:
        path = (
            find_recipe(extends, bases=True)
            if is_recipe_name(extends)
            else Path(recipe.source).parent / extends
        )
        files = [file.resolve() for file in chain]
        if path.resolve() in files:
            circle = " -> ".join(map(str, (*chain[files.index(path.resolve()) :], path)))
            raise RecipeError(f"the recipes extend each other in a circle: {circle}; take one of them out")
        return [*recipe_layers(read(path), chain), own_layer]
    except RecipeError as error:
        raise RecipeError(f"{where}: extends {extends!r}: {error}") from error


def find_profile(profile: str, recipe: Path) -> Path:
    """The path of a profile: ``profile`` itself if it is a file name, or else the first match in the
    ``profiles`` folders next to the recipe, above it, in ./recipes and among the shipped recipes.
    """
    if profile.endswith((".yaml", ".yml")) or "/" in profile:
        return Path(profile)
    folders = [parent / "profiles" for parent in recipe.absolute().parents]
    folders += [Path("recipes/profiles"), RECIPES_FOLDER / "profiles"]
    for folder in folders:
        if (folder / f"{profile}.yaml").is_file():
            return folder / f"{profile}.yaml"
    known = {item.stem for folder in folders for item in folder.glob("*.yaml")}
    raise RecipeError(
        "no profile is called "
        f"{profile!r}{suggestion(profile, known) or f'; there is no profiles folder above {recipe}'}"
    )


def read_profile(path: Path) -> Document:
    """A profile. Raises RecipeError if it sets more than model, data and sizes.

    The options of an environment in the section ``environments`` count as sizes.
    """
    document = read(path)
    problems = [
        f"{document.location_of(key)}: {'.'.join(map(str, key))}: a profile replaces model, data and sizes "
        "and nothing else; write it in the recipe or pass it with --set"
        for key in _leaves(document.data)
        if (
            key[0] not in ("sizes", OFFLINE_KEY, ENVIRONMENTS_KEY)
            and not any(_starts_with(key, allowed) for allowed in PROFILE_KEYS)
        )
        or (
            key[0] == ENVIRONMENTS_KEY
            and not any(_starts_with(key[2:], allowed) for allowed in (*PROFILE_KEYS, "rollout.environment"))
        )
    ]

    problems += [
        f"{document.location_of(key)}: {'.'.join(map(str, key))}: below {OFFLINE_KEY} a profile replaces "
        f"{', '.join(OFFLINE_PROFILE_KEYS)} and nothing else; write it in the recipe or pass it with --set"
        for key in _leaves(document.data)
        if key[0] == OFFLINE_KEY
        and not any(_starts_with(key, f"{OFFLINE_KEY}.{allowed}") for allowed in OFFLINE_PROFILE_KEYS)
    ]

    problems += _size_problems(document)
    if problems:
        raise RecipeError(problems)
    return document


def _size_problems(profile: Document) -> Iterator[str]:
    """Checks ``sizes: {METHOD: {x_tokens: COUNT}}``, which sets the hyperparameters that are token counts."""
    sizes = profile.data.get("sizes", {})
    if not isinstance(sizes, dict) or not all(isinstance(item, dict) for item in sizes.values()):
        yield (
            f"{profile.location_of(('sizes',))}: sizes must map a method to its sizes, e.g. {{length: "
            f"{{max_tokens: 8}}}}, got {sizes!r}"
        )
        return
    for name, item in sizes.items():
        for key in item:
            if not key.endswith("_tokens"):
                yield (
                    f"{profile.location_of(('sizes', name, key))}: sizes.{name}.{key}: a profile may set "
                    "hyperparameters that count tokens (their names end in _tokens) and no others; write it "
                    "in the recipe or pass it with --set"
                )


# merging ----------------------------------------------------------------------------------------------------


def merge_mappings(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """``upper`` merged over ``lower``; neither is changed."""
    if any(
        isinstance(upper.get(key), str) and upper[key] != lower.get(key, upper[key]) for key in _IDENTITY_KEYS
    ):
        kept = {name: lower[name] for key, name in _METHOD_KEYS.items() if key in upper and name in lower}
        return copy.deepcopy({**kept, **upper})
    result = copy.deepcopy(dict(lower))
    for key, value in upper.items():
        current = result.get(key)
        result[key] = (
            merge_mappings(current, value)
            if isinstance(current, dict) and isinstance(value, dict)
            else copy.deepcopy(value)
        )
    return result


def with_sizes(data: Mapping[str, Any], sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """``data`` with the sizes added to the methods it uses; sizes of other methods are ignored."""
    result = copy.deepcopy(dict(data))
    for holder, key in list(method_places(result)):
        method = {"name": holder[key]} if isinstance(holder[key], str) else holder[key]
        name = method.get("name") if isinstance(method, dict) else None
        if isinstance(name, str) and name in sizes:  # the schema refuses other names
            holder[key] = {**method, **sizes[name]}
    return result


def with_override(data: Mapping[str, Any], override: str) -> tuple[dict[str, Any], Document]:
    """``data`` with one override ``a.b.0.c=VALUE`` applied, and the override as a layer.

    VALUE is YAML: 1e-6, null, [1, 8], {name: rloo}.
    """
    source = f"--set {override}"
    dotted, equals, text = override.partition("=")
    parts = dotted.split(".")
    if not equals or not all(parts):
        raise RecipeError(
            f"{source}: expected KEY=VALUE with a dotted key, such as --set learner.optimizer.lr=1e-6"
        )
    if parts[0] in ("extends", "sizes"):
        raise RecipeError(f"{source}: {parts[0]} is read from files only; set the single keys instead")

    value, lines = parse_value(text, source)
    result = copy.deepcopy(dict(data))
    key: KeyPath = ()
    holder: Any = result
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        step = _resolve_key_part(holder, part, key, source)
        key = (*key, step)
        if following is None:
            holder[step] = value
            drop_digest(holder, step)
            break
        if holder[step] is None:
            holder[step] = [] if following.isdecimal() else {}
        elif isinstance(holder[step], str) and _is_method(key):
            holder[step] = {"name": holder[step]}  # a plain name gains hyperparameters
        holder = holder[step]

    key_lines = {key[:length]: 0 for length in range(1, len(key) + 1)} | {
        (*key, *inner): 0 for inner in lines
    }
    result = with_absolute_names(result, Path.cwd())
    return result, Document(source, result, key_lines)


def _resolve_key_part(holder: Any, part: str, key: KeyPath, source: str) -> Any:
    """``part`` as a key of ``holder``, added if it is missing. In a list it is an index; the index just past
    the end appends an item.
    """
    dotted = ".".join(map(str, key))
    if isinstance(holder, dict):
        holder.setdefault(part, None)
        return part
    if not isinstance(holder, list):
        raise RecipeError(
            f"{source}: {dotted} is {holder!r}, it has no key {part!r} below it; set {dotted} itself"
        )
    # a position of thousands of digits is no number to Python
    if not part.isdecimal() or len(part) > _POSITION_DIGITS or int(part) > len(holder):
        expected = f"expected a position from 0 to {len(holder)}, got {part!r}; or set {dotted} as a whole"
        raise RecipeError(f"{source}: {dotted} holds {len(holder)} in the recipe, {expected}")
    if int(part) == len(holder):
        holder.append(None)
    return int(part)


def _is_method(key: KeyPath) -> bool:
    """Whether a recipe names a method at ``key``."""
    plain = tuple(part for part in key if isinstance(part, str))
    methods = {
        ("advantage",),
        ("control",),
        ("loss", "policy"),
        ("loss", "aggregate"),
        ("loss", "terms"),
        ("reward", "functions"),
        ("loss", PREFERENCE_KEY),
        ("rollout", "extra_samples"),
        ("data", "order"),
        ("loss", "terms", "coefficient"),
        ("process_reward", "loss"),
        ("pairs", "judge"),
    }
    return plain in methods


def _leaves(value: Any, key: KeyPath = ()) -> Iterator[KeyPath]:
    """The keys of all values except non-empty mappings."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(item, (*key, name))
    elif key:
        yield key


def _starts_with(key: KeyPath, dotted: str) -> bool:
    parts = tuple(dotted.split("."))
    return key[: len(parts)] == parts

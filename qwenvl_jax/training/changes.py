"""What is not the same in two sets of settings: those that a run had, and those of a new start."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from qwenvl_jax.config import ParameterRule, to_dict

# Mappings that samples are drawn from, in their order.
_ORDERED = ("data.tasks", "data.mixture")


def with_newer_settings(saved: Any, config: Any) -> Any:
    """Returns the saved fields of a config and, of settings that they lack, the defaults.

    An older version did not know them, and did what the default says.
    """
    if isinstance(config, tuple) and isinstance(saved, list) and len(saved) == len(config):
        return [with_newer_settings(a, b) for a, b in zip(saved, config, strict=True)]
    if not dataclasses.is_dataclass(config) or not isinstance(saved, Mapping):
        return saved
    whole = dict(saved)
    for field in dataclasses.fields(config):
        if field.name in saved:
            whole[field.name] = with_newer_settings(saved[field.name], getattr(config, field.name))
        elif field.default is not dataclasses.MISSING:
            is_group = dataclasses.is_dataclass(field.default)
            whole[field.name] = to_dict(field.default) if is_group else field.default
        elif field.default_factory is not dataclasses.MISSING:
            whole[field.name] = field.default_factory()
    return whole


def differences(old: Any, new: Any, path: str = "") -> dict[str, str]:
    """Returns dotted field -> "field: was OLD, now NEW" for every leaf that differs."""
    if path == "parameters" and (told := _other_rows(old, new)):
        return {path: f"{path}: {told}"}
    if isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        if path in _ORDERED and set(old) == set(new) and list(old) != list(new):
            return {path: f"{path}: the order was {list(old)}, now {list(new)}"}
        found = {}
        for key in sorted(set(old) | set(new)):
            where = f"{path}.{key}" if path else str(key)
            found |= differences(old.get(key), new.get(key), where)
        return found
    if json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True):  # tuples are lists there
        return {}
    return {path: f"{path}: was {old}, now {new}"}


def _other_rows(old: Any, new: Any) -> str:
    """Returns what has become of the table of what trains, if its rows are for other patterns."""
    rows = [[row for row in table or () if isinstance(row, Mapping)] for table in (old, new)]
    before, now = ([row.get("pattern") for row in table] for table in rows)
    if before == now:
        return ""
    old_rows, new_rows = ([_row_text(row) for row in table] for table in rows)
    gone = [text for text in old_rows if text not in new_rows]
    added = [text for text in new_rows if text not in old_rows]
    if not gone and not added:
        return f"the order of rows was {', '.join(old_rows)}; now {', '.join(new_rows)}"
    return f"rows that are gone: {', '.join(gone) or 'none'}; new: {', '.join(added) or 'none'}"


def _row_text(row: Mapping[str, Any]) -> str:
    """Returns a row's pattern, and what else in it is not as usual."""
    usual = to_dict(ParameterRule(""))
    others = [f"{k}={v}" for k, v in row.items() if k != "pattern" and usual.get(k, v) != v]
    return " ".join([repr(row.get("pattern")), *others])


def flat_fields(fields: Any, path: str = "") -> dict[str, Any]:
    """Returns dotted field -> leaf of nested dicts and sequences."""
    if isinstance(fields, list | tuple):
        fields = dict(enumerate(fields))
    if not isinstance(fields, Mapping):
        return {path: fields}
    flat = {}
    for key, value in fields.items():
        flat |= flat_fields(value, f"{path}.{key}" if path else str(key))
    return flat

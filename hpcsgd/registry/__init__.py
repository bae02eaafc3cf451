"""Options: specs, ``NAME:key=value,key=value``, and the limits of values, declared in annotations."""

from __future__ import annotations

from hpcsgd.registry.limits import Accepted, Text, Within
from hpcsgd.registry.rows import Rows
from hpcsgd.registry.specs import bind, build, describe, format_spec, limited, parse
from hpcsgd.registry.values import (
    check,
    check_fields,
    checked,
    convert,
    expected,
    field_values,
    names_only,
    read,
    type_name,
)

__all__ = [
    "Accepted",
    "Rows",
    "Text",
    "Within",
    "bind",
    "build",
    "check",
    "check_fields",
    "checked",
    "convert",
    "describe",
    "expected",
    "field_values",
    "format_spec",
    "limited",
    "names_only",
    "parse",
    "read",
    "type_name",
]

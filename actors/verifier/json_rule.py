"""The rule `json_schema`, by the package jsonschema. Nothing is fetched: a schema may refer to itself only.

Run where it can be killed: a schema may hold patterns that take forever.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any, NoReturn

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from ..types import Verdict
from .case import BadReference, Case
from .extract import MAX_CHARS, after_thinking
from .policies import JsonPolicy

_BLOCK = re.compile(r"```[a-zA-Z]{0,16}\n(.*?)```", re.DOTALL)


def check(reference: str, policy: JsonPolicy) -> None:
    _schema(reference)


def judge(case: Case, policy: JsonPolicy) -> Verdict:
    """Right iff the document fits the schema. Repeated keys, NaN and numbers of over 4300 digits are no JSON."""
    schema = _schema(case.reference)
    text = _document(case.response, fenced=policy.fenced)
    try:
        document = json.loads(text, parse_constant=_refuse, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        return Verdict(correct=False, note=f"no JSON: {error}"[:200])
    try:
        problem = next(schema.iter_errors(document), None)
    except Unresolvable as error:
        raise BadReference(f"the schema refers to what is not in it: {error}") from None
    except RecursionError:
        return Verdict(correct=False, note="nested too deeply")
    return Verdict(correct=problem is None, note="" if problem is None else problem.message[:200])


@lru_cache(maxsize=64)
def _schema(text: str) -> Draft202012Validator:
    try:
        schema = json.loads(text)
        Draft202012Validator.check_schema(schema)
        resource = DRAFT202012.create_resource(schema)
        _resolve(resource, Registry().with_resource("", resource).resolver())
        return Draft202012Validator(schema, registry=Registry())
    except (ValueError, RecursionError) as error:
        raise BadReference(f"the reference is no JSON: {error}") from None
    except SchemaError as error:
        raise BadReference(f"the reference is no JSON Schema: {error.message}") from None
    except Unresolvable as error:
        raise BadReference(f"the schema refers to what is not in it: {error}") from None


def _resolve(resource: Resource[Any], resolver: Any) -> None:
    """Looks up all that the schema refers to: most documents would never lead there."""
    if isinstance(resource.contents, dict) and isinstance(target := resource.contents.get("$ref"), str):
        resolver.lookup(target)
    for part in resource.subresources():
        _resolve(part, resolver.in_subresource(part))


def _document(response: str, *, fenced: bool) -> str:
    """The document's characters as they are: a string in JSON may hold any."""
    text = after_thinking(response) if len(response) <= MAX_CHARS else ""
    blocks = _BLOCK.findall(text) if fenced else []
    return str(blocks[-1]) if blocks else text


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        raise ValueError("a key is repeated")
    return keys

"""Validators of results files. Each schema is itself checked once: `jsonschema.validate` does that at every call."""

import functools

from jsonschema import Draft202012Validator

from bench.schemas.generator import json_schema


@functools.cache
def validator(results: type) -> Draft202012Validator:
    """Of the files that a record of `bench.schemas` describes; `validate` raises `jsonschema.ValidationError`."""
    schema = json_schema(results)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)

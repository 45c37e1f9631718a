"""Values that clients write instead of a field's strict one, and their meaning: one rule for each type of field.

The rules come from the types of a Struct alone, so a new field gets them without a word. The Struct itself, and with
it the OpenAPI, stays strict: these values are taken, not documented. What no rule knows passes unchanged, for the
strict decoding to refuse.

| The field is | taken as well |
|---|---|
| optional | an empty string, white space (unless it is `VERBATIM`) or null: the field is absent |
| a number | the number in quotes; 42.0 for a whole number |
| true or false | "true" and "false", in any case |
| one of several words | any case, with white space around it |
| a name (`TRIMMED`) | white space around it |
| any with `absent(value)` | that value: the field is absent |
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import msgspec.inspect as mi

TRIMMED: Final = {"trimmed": True}
"""`Meta(extra=TRIMMED)`: white space around the string means nothing."""

VERBATIM: Final = {"verbatim": True}
"""`Meta(extra=VERBATIM)`: a string of white space, and an empty one, are values of this optional field."""

_NUMBER: Final = re.compile(r"[+-]?(?P<whole>[0-9]{1,40})(?:\.(?P<fraction>[0-9]{0,40}))?(?:[eE][+-]?[0-9]{1,3})?")
_BOOLEANS: Final = {"true": True, "false": False}

_MAX_OBJECTS: Final = 10_000
"""Objects in a list that are read one by one; the strict decoding alone judges a longer list, by its first mistake."""


def absent(value: float) -> dict[str, Any]:
    """`Meta(extra=absent(-1))`: clients write -1 for the absence of this field."""
    return {"absent": value}


class LenientFields:
    """The fields of the Struct `kind`; `aliases` are other names of them."""

    def __init__(self, kind: type, aliases: Mapping[str, str] | None = None) -> None:
        fields: tuple[mi.Field, ...] = mi.type_info(kind).fields  # type: ignore[attr-defined]  # it is a Struct
        self._rules = {field.encode_name: _Rule(field) for field in fields}
        self._aliases = dict(aliases or {})
        # Splits an object into its known fields, each still JSON, and skips the rest. Decoding all of it could block
        # the event loop: 16 MB of empty lists in an unknown field take 1.5 s and 500 MB.
        names = (*self._rules, *self._aliases)
        self.outline: type[Any] = msgspec.defstruct("Outline", [(name, msgspec.Raw, msgspec.Raw()) for name in names])
        self._split = msgspec.json.Decoder(self.outline)

    def of_json(self, body: bytes | msgspec.Raw) -> dict[str, Any]:
        """The fields of a JSON object, to be encoded as JSON again: a value that no rule changed is still JSON (Raw).

        Raises what msgspec raises: ValidationError if `body` is no object, DecodeError if it is no JSON.
        """
        return self.of_outline(self._split.decode(body))

    def of_outline(self, split: Any) -> dict[str, Any]:
        """The fields of an object that is split already."""
        given = {name: raw for name in split.__struct_fields__ if len(raw := getattr(split, name))}
        return self._without_absent(given, _Rule.json)

    def of_form(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a form, whose values are strings and files."""
        return self._without_absent(given, _Rule.value)

    def _without_absent(self, given: Mapping[str, Any], read: Any) -> dict[str, Any]:
        """`given` under the fields' own names, without those that are absent.

        An alias counts if the field itself is absent or empty.
        """
        fields: dict[str, Any] = {}
        for name, raw in given.items():
            alias_of = self._aliases.get(name)
            rule = self._rules.get(alias_of or name)
            if rule is None:
                continue
            value = read(rule, raw)
            if value is msgspec.UNSET or (alias_of and (_is_empty(value) or not _is_empty(fields.get(alias_of)))):
                continue
            fields[alias_of or name] = value
        return fields


class _Rule:
    """The values that one field takes, beside strict ones."""

    def __init__(self, field: mi.Field) -> None:
        kinds, extra = _parts(field.type)
        self._optional = not field.required
        self._absent = extra.get("absent")
        self._trimmed = extra.get("trimmed", False)
        self._verbatim = extra.get("verbatim", False)
        self._is_string = any(isinstance(kind, mi.StrType) for kind in kinds)
        self._is_boolean = any(isinstance(kind, mi.BoolType) for kind in kinds)
        self._is_fraction = any(isinstance(kind, mi.FloatType) for kind in kinds)
        self._is_whole = any(isinstance(kind, mi.IntType) for kind in kinds) and not self._is_fraction
        words = [word for kind in kinds if isinstance(kind, mi.LiteralType) for word in kind.values]
        self._words = {word.casefold(): word for word in words if isinstance(word, str)}
        self._object = next((LenientFields(kind.cls) for kind in kinds if isinstance(kind, mi.StructType)), None)
        items = [part for kind in kinds if isinstance(kind, mi.ListType) for part in _parts(kind.item_type)[0]]
        self._item = next((LenientFields(item.cls) for item in items if isinstance(item, mi.StructType)), None)

    def json(self, raw: msgspec.Raw) -> Any:
        """The meaning of a JSON value: `raw` itself if it is strict already, UNSET if it stands for no value."""
        first = memoryview(raw)[:1].tobytes()
        if first == b"{":
            return self._object.of_json(raw) if self._object else raw
        if first == b"[":
            return list_of_objects(raw, self._item) if self._item else raw
        try:
            value = msgspec.json.decode(raw)
        except msgspec.ValidationError:  # a number like 1e999
            return raw
        meant = self.value(value)
        return raw if meant is value else meant

    def value(self, value: Any) -> Any:
        """The meaning of a plain value: `value` itself if it is strict already, UNSET if it stands for no value."""
        if isinstance(value, str):
            value = self._of_string(value)
        elif value is None and self._optional:
            return msgspec.UNSET
        if self._is_whole and isinstance(value, float) and value.is_integer():
            value = int(value)
        if self._absent is not None and value == self._absent and not isinstance(value, bool):
            return msgspec.UNSET
        return value

    def _of_string(self, text: str) -> Any:
        trimmed = text.strip()
        if not trimmed and self._optional and not self._verbatim:
            return msgspec.UNSET
        if self._words:
            text = self._words.get(trimmed.casefold(), text)
        if self._is_string or self._words:
            return trimmed if self._trimmed and len(trimmed) != len(text) else text
        if self._is_boolean:
            return _BOOLEANS.get(trimmed.casefold(), text)
        if (self._is_whole or self._is_fraction) and (number := _NUMBER.fullmatch(trimmed)):
            # Not by way of a float: it would round a seed of 60 bits.
            is_whole = trimmed.lstrip("+-").isdigit()
            meant = int(trimmed) if is_whole else float(number[0])
            return meant if math.isfinite(meant) else text
        return text


def list_of_objects(raw: msgspec.Raw, item: LenientFields) -> Any:
    """The fields of each object in a JSON list, or `raw` itself if it is another value."""
    if bytes(raw).count(b"{") > _MAX_OBJECTS:
        return raw
    try:
        split = msgspec.json.decode(raw, type=list[item.outline])  # type: ignore[name-defined]
    except msgspec.ValidationError:
        return raw
    return [item.of_outline(each) for each in split]


def _parts(kind: mi.Type) -> tuple[list[mi.Type], dict[str, Any]]:
    """The members of a union, or `kind` alone, and the `extra` of all Metas around them."""
    if isinstance(kind, mi.Metadata):
        kinds, extra = _parts(kind.type)
        return kinds, extra | (kind.extra or {})
    if isinstance(kind, mi.UnionType):
        inner = [_parts(member) for member in kind.types]
        return [part for kinds, _ in inner for part in kinds], {k: v for _, extra in inner for k, v in extra.items()}
    return [kind], {}


def _is_empty(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, msgspec.Raw) and bytes(value) in {b"null", b'""'})

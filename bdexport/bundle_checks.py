"""The small checks behind the bundle's manifest: typed reading of JSON, paths, hashes, how the parts fit together."""

from __future__ import annotations

import hashlib
import json
import re
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from bdexport.errors import BundleError, InputError
from bdexport.files import CONTROLS, without_controls
from bdexport.json_text import MalformedError, json_kind, parse_json, shown
from bdexport.parts import FULL, HEAD, POLICY, STEM, block_part, mask_from_text, shortcut_part
from bdexport.tensors import TensorSpec

if TYPE_CHECKING:
    from bdexport.manifest import Manifest

MAX_MANIFEST_BYTES = 4 << 20
DIGEST = "manifest_sha256"  # the document's own digest; bundles of earlier builds have none
MAX_INTEGER = 2**53 - 1  # what every JSON reader keeps exactly (RFC 8259, section 6), and a float holds
SHOWN_CHARACTERS = 200
REBUILD = "copy the bundle again, or rebuild it with `bdexport build`"
_MISSING = object()
_RESERVED = re.compile(r'[\\:*?"<>|\x00-\x1f]')  # not allowed in file names on one system or another


def rule_error(
    rule: str, what: str, *, got: object = None, expected: object = None, remedy: str = REBUILD
) -> BundleError:
    """A :class:`BundleError` that names the rule of ``docs/bundle-format.md`` that is broken."""
    return BundleError(f"{what} [{rule}]", got=_clipped(got), expected=_clipped(expected), remedy=remedy)


def _clipped(value: object) -> object:
    if value is None:
        return None
    text = without_controls(repr(value) if isinstance(value, dict | list | tuple) else str(value))
    return text[:SHOWN_CHARACTERS] + ".." if len(text) > SHOWN_CHARACTERS else text


def read_document(path: Path) -> bytes:
    """The bytes of a manifest, at most 4 MiB. Raises :class:`BundleError` (R1)."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise rule_error("R1", f"{path}: cannot be read ({error.strerror})", remedy="check its permissions") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise rule_error("R1", f"{path}: not a manifest (larger than {MAX_MANIFEST_BYTES} bytes)")
    return data


def parse_document(data: bytes, path: Path) -> Any:
    """Parse the bytes of the manifest ``path``: UTF-8 JSON without NaN and without repeated keys.

    Raises :class:`BundleError` (R1).
    """
    try:
        return parse_json(data)
    except MalformedError as error:
        raise rule_error("R1", f"{path}: not a manifest ({error})") from error


class Reader:
    """Takes typed values out of one JSON object; what is left over at :meth:`finish` is an error (R3)."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise rule_error("R3", where, got=json_kind(data), expected="an object")
        self.where, self._data, self._taken = where, data, set[str]()

    def _take(self, key: str, rule: str, kinds: tuple[type, ...], expected: str) -> Any:
        value = self._data.get(key, _MISSING)
        self._taken.add(key)
        if value is _MISSING:
            raise rule_error("R3", f"{self.where}: {key} is missing", expected=expected)
        # bool is an int in Python, not in the format.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise rule_error(rule, f"{self.where}: {key}", got=shown(value), expected=expected)
        return value

    def text(self, key: str, rule: str = "R4") -> str:
        """A string that is not empty."""
        value: str = self._take(key, rule, (str,), "a string")
        if not value.strip() or "\n" in value or "\t" in value:  # see check_printable for every other character
            raise rule_error(
                rule, f"{self.where}: {key}", got=shown(value), expected="a line of text that is not empty"
            )
        return value

    def optional_text(self, key: str, rule: str = "R4") -> str | None:
        """A string that is not empty, or null."""
        return None if self._take(key, rule, (str, type(None)), "a string or null") is None else self.text(key, rule)

    def choice(self, key: str, allowed: tuple[str, ...], rule: str = "R4") -> str:
        """One of the given strings."""
        value = self.text(key, rule)
        if value not in allowed:
            raise rule_error(rule, f"{self.where}: {key}", got=shown(value), expected=" or ".join(allowed))
        return value

    def time(self, key: str) -> str:
        """A time in ISO 8601 with its offset from UTC."""
        value = self.text(key)
        try:
            aware = datetime.fromisoformat(value).tzinfo is not None
        except ValueError:
            aware = False
        if not aware:
            raise rule_error(
                "R4", f"{self.where}: {key}", got=shown(value), expected="ISO 8601 with an offset from UTC"
            )
        return value

    def integer(self, key: str, rule: str, minimum: int, maximum: int = MAX_INTEGER) -> int:
        """An integer within bounds."""
        span = f"an integer in {minimum}..{maximum}"
        value: int = self._take(key, rule, (int,), span)
        if not minimum <= value <= maximum:
            raise rule_error(rule, f"{self.where}: {key}", got=value, expected=span)
        return value

    def optional_integer(self, key: str, rule: str, minimum: int) -> int | None:
        """An integer, at least ``minimum``, or null."""
        value = self._take(key, rule, (int, type(None)), f"an integer, at least {minimum}, or null")
        return None if value is None else self.integer(key, rule, minimum)

    def share(self, key: str, rule: str = "R15") -> float:
        """A number in 0..1."""
        value: float = self._take(key, rule, (int, float), "a number in 0..1")
        if not 0 <= value <= 1:
            raise rule_error(rule, f"{self.where}: {key}", got=value, expected="a number in 0..1")
        return value

    def integers(self, key: str, rule: str) -> tuple[int, ...]:
        """A list of integers."""
        values = self.items(key, rule)
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            raise rule_error(rule, f"{self.where}: {key}", got=values, expected="a list of integers")
        return tuple(values)

    def texts(self, key: str, minimum: int, rule: str = "R4") -> tuple[str, ...]:
        """A list of at least ``minimum`` strings."""
        values = self.items(key, rule)
        if len(values) < minimum or not all(isinstance(value, str) and value for value in values):
            raise rule_error(rule, f"{self.where}: {key}", got=values, expected=f"at least {minimum} strings")
        return tuple(values)

    def items(self, key: str, rule: str) -> list[Any]:
        """A list."""
        values: list[Any] = self._take(key, rule, (list,), "a list")
        return values

    def mapping(self, key: str, rule: str = "R4") -> dict[str, Any]:
        """A JSON object."""
        value: dict[str, Any] = self._take(key, rule, (dict,), "an object")
        return value

    def optional_mapping(self, key: str, rule: str = "R4") -> dict[str, Any] | None:
        """A JSON object, or null."""
        value: dict[str, Any] | None = self._take(key, rule, (dict, type(None)), "an object or null")
        return value

    def absent_or_mapping(self, key: str, rule: str = "R4") -> dict[str, Any] | None:
        """A JSON object, or None where the key, which later writers added, is absent."""
        return self.mapping(key, rule) if key in self._data else None

    def absent_or_text(self, key: str, rule: str = "R4") -> str | None:
        """A string that is not empty, or None where the key, which later writers added, is absent."""
        return self.text(key, rule) if key in self._data else None

    def text_mapping(self, key: str, rule: str = "R4") -> dict[str, str]:
        """A JSON object whose values are strings."""
        value = self.mapping(key, rule)
        if not all(isinstance(item, str) for item in value.values()):
            raise rule_error(rule, f"{self.where}: {key}", got=value, expected="an object of strings")
        return value

    def finish(self) -> None:
        """Raise for keys that nobody took."""
        unknown = sorted(set(self._data) - self._taken)
        if unknown:
            remedy = "put what other tools add under 'extra'"
            raise rule_error("R3", f"{self.where}: unknown keys", got=unknown, remedy=remedy)


def check_printable(data: Any, where: str) -> None:
    """R4: no string in the document holds a character that a terminal would obey instead of showing it."""
    pending = [data]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, str) and CONTROLS.search(value):
            raise rule_error(
                "R4",
                f"{where}: a text",
                got=ascii(value),
                expected="no control characters",
                remedy="do not trust this bundle",
            )


def check_path(text: str, where: str) -> None:
    """R8: relative, POSIX, inside the bundle, and in its shortest form."""
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or path.as_posix() != text or _RESERVED.search(text) or text == ".":
        expected = "a relative path inside the bundle, with '/' and without '..'"
        raise rule_error("R8", f"{where}: path", got=repr(text), expected=expected, remedy="do not trust this bundle")


def check_sha256(text: str, where: str) -> None:
    """R10: 64 lower-case hexadecimal digits."""
    if re.fullmatch(r"[0-9a-f]{64}", text) is None:
        raise rule_error("R10", f"{where}: sha256", got=repr(text), expected="64 lower-case hexadecimal digits")


def document_sha256(document: dict[str, Any]) -> str:
    """SHA-256 of a manifest's canonical form (R18): the document without the digest itself, as one line of ASCII."""
    rest = {key: value for key, value in document.items() if key != DIGEST}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def check_document(document: dict[str, Any], digest: str | None, where: str) -> bool:
    """R18: a digest that is there is the document's. Returns whether it is there."""
    if digest is not None and digest != (found := document_sha256(document)):
        what = f"{where}: changed since it was written"
        raise rule_error("R18", what, got=f"SHA-256 {found[:12]}..", expected=f"{digest[:12]}..")
    return digest is not None


def check_chain(manifest: Manifest, where: str) -> None:
    """R11: the image fits the first parts, every part takes what the one before it gives, logits fit the classes."""
    parts, image = manifest.parts, (3, *manifest.preprocess.size)

    def expect(part: str, end: str, spec: TensorSpec, shape: tuple[int, ...], source: str) -> None:
        if spec.shape != shape:
            expected = f"{list(shape)} ({source})"
            raise rule_error("R11", f"{where}: {part} {end}", got=list(spec.shape), expected=expected)

    for name in (POLICY, STEM, FULL):
        expect(name, "input", parts[name].input, image, "the preprocessed image")
    expect(POLICY, "output", parts[POLICY].output, (manifest.num_blocks,), "one probability per block")
    shape = parts[STEM].output.shape
    for index in range(manifest.num_blocks):
        block = parts[block_part(index)]
        expect(block.name, "input", block.input, shape, "the output before it")
        if index in manifest.transitions:
            other = parts[shortcut_part(index)]
            expect(other.name, "input", other.input, shape, "the block's")
            expect(other.name, "output", other.output, block.output.shape, "the block's")
        else:
            expect(block.name, "output", block.output, shape, "its input: not a transition")
        shape = block.output.shape
    expect(HEAD, "input", parts[HEAD].input, shape, "the last block's output")
    for name in (HEAD, FULL):
        expect(name, "output", parts[name].output, (len(manifest.class_names),), "one logit per class")


def check_statistics(statistics: dict[str, Any], num_blocks: int, where: str) -> None:
    """R15: policy statistics are empty, or hold a split, a number of images, and masks with their counts and shares."""
    if not statistics:
        return
    reader = Reader(statistics, f"{where}: policy_statistics")
    reader.text("split", "R15")
    images, masks = reader.integer("images", "R15", 1), reader.items("masks", "R15")
    total = 0
    for data in masks:
        item = Reader(data, f"{reader.where} masks")
        try:
            mask_from_text(item.text("mask", "R15"), num_blocks)
        except InputError as error:
            raise rule_error("R15", f"{item.where}: {error}") from error
        item.share("share")
        total += item.integer("count", "R15", 1)
    if total > images:
        raise rule_error("R15", f"{reader.where}: masks", got=f"{total} counted", expected=f"at most {images} images")

"""Manifests that a test changes: with a digest that is true again, so that the change itself is what is looked at."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bdexport.bundle import Bundle, file_entry
from bdexport.bundle_checks import DIGEST, document_sha256


def change_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of the bundle at ``bundle`` in place; its digest, where it has one, becomes the new one's."""
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    if DIGEST in data:
        data[DIGEST] = document_sha256(data)
    path.write_text(json.dumps(data, indent=1) + "\n")


def with_engines_as_they_are(bundle: Bundle) -> Bundle:
    """The bundle with the hashes of the engine files that lie in its folder now, as if it had been built with them."""
    parts = {
        name: part if part.engine is None else replace(part, engine=file_entry(bundle.path, bundle.engine(name)))
        for name, part in bundle.manifest.parts.items()
    }
    return Bundle(bundle.path, replace(bundle.manifest, parts=parts))

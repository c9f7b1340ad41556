"""A bundle's engines built anew from its own graphs: for another version of the backend, or another processor.

Neither torch nor onnx is needed, nor the checkpoint: a production machine does this with what it runs bundles with.
The new engines are verified against the graphs before anybody gets them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from bdexport import __version__
from bdexport.backends import get_backend
from bdexport.backends.base import Backend, BuildOptions, Misfit, RebuildingBackend
from bdexport.bundle import (
    MANIFEST,
    SIGNATURE,
    Bundle,
    BundleFile,
    FileEntry,
    Manifest,
    PartEntry,
    file_entry,
    open_bundle,
    write_manifest,
)
from bdexport.bundle_checks import document_sha256
from bdexport.engine_cache import engine_recipe
from bdexport.errors import BackendError, BundleError, OutputError
from bdexport.files import (
    CACHE_VARIABLE,
    UntrustedError,
    check_trusted,
    default_cache_folder,
    make_cache,
    making_folder,
    write_bytes,
)
from bdexport.verify import require, verify_against_graphs

REBUILT = "rebuilt"  # key of manifest.extra: when, and what the engines were for before
ENGINES = "engines"
REFERENCE = "onnxruntime"  # the backend that runs graphs as they are
Progress = Callable[[str, float, int], None]  # what is being done, steps done, steps in all


@dataclass(frozen=True)
class RebuiltBundle(Bundle):
    """A bundle with new engines. ``misfit``: why the old ones did not fit; None where they did."""

    misfit: Misfit | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


def rebuild_bundle(
    bundle: Bundle, out: Path | None = None, *, overwrite: bool = False, progress: Progress | None = None
) -> RebuiltBundle:
    """Build every engine of ``bundle`` for this machine, verify them, and write the bundle at ``out``.

    ``out`` None: in the place of ``bundle``, which stays as it is until the new one is complete. Raises
    :class:`BundleError` for a bundle whose graphs are not in it, BackendError for a backend that is not here or whose
    engines cannot be rebuilt, BuildError, VerificationError, OutputError; after them, the old bundle is as it was.
    """
    report: Progress = progress or (lambda _what, _done, _total: None)
    began = perf_counter()
    old, backend = bundle.manifest, _rebuilder(bundle)
    signed = (bundle.path / SIGNATURE).is_file()
    misfit = backend.misfit(old)
    sources = {part: _source(bundle, part, backend).path for part in old.parts}
    options = BuildOptions(old.precision, old.max_batch)
    place = bundle.path.resolve() if out is None else out
    with _placed(out), making_folder(place, overwrite or out is None) as staging:
        for kept in (file for part in old.parts.values() for file in (part.graph, part.source) if file is not None):
            write_bytes(staging / kept.path, BundleFile(bundle.path, kept).read_bytes())
        (staging / ENGINES).mkdir(exist_ok=True)
        parts: dict[str, PartEntry] = {}
        for number, (part, entry) in enumerate(old.parts.items()):
            report("engines", number, len(sources))
            engine = staging / ENGINES / f"{part}{backend.engine_suffix}"
            backend.build_part(part, staging / sources[part], engine, options)
            parts[part] = replace(entry, engine=file_entry(staging, engine))
        report("engines", len(sources), len(sources))
        manifest = _manifest(old, backend, parts)
        verification, notes = _verified(Bundle(staging, manifest), report)
        write_manifest(staging, replace(manifest, verification=verification))
    if signed:
        notes += (f"not signed: the bundle was, and this one is new; sign it: minisign -Sm {place / MANIFEST}",)
    opened = open_bundle(place)
    return RebuiltBundle(opened.path, opened.manifest, misfit, perf_counter() - began, notes)


def rebuilt_for_here(bundle: Bundle) -> tuple[Bundle, str]:
    """The bundle itself where its engines fit this machine; otherwise one with engines that do, from the cache folder.

    It is made there the first time. Also says which of these was done. Raises as :func:`rebuild_bundle`.
    """
    backend = _rebuilder(bundle)
    misfit = backend.misfit(bundle.manifest)
    if misfit is None:
        return bundle, "rebuild: not needed, the bundle's engines are for this machine"
    why = f"the bundle's {misfit.what} (got {misfit.got}, here {misfit.here})"
    kept = _place(bundle, backend)
    check_trusted(kept.parent)
    check_trusted(kept)
    try:
        return open_bundle(kept), f"rebuilt before: {why}; engines of {kept}"
    except BundleError:  # not there yet, or damaged
        pass
    with _in_cache():
        make_cache(kept.parent.parent)
        make_cache(kept.parent)
        try:
            made = rebuild_bundle(bundle, kept, overwrite=kept.exists())
            kept.chmod(0o700)  # whatever the umask allows to others
        except OutputError:
            if not (kept / MANIFEST).is_file():
                raise
            return open_bundle(kept), f"rebuilt by another process meanwhile: {why}; engines of {kept}"
    return made, "; ".join((f"rebuilt in {made.seconds:.1f} s: {why}; engines of {kept}", *made.notes))


def _place(bundle: Bundle, backend: Backend) -> Path:
    """Where the cache has the rebuilt bundle: a name for all that the engines depend on, weights and code included."""
    options = BuildOptions(bundle.manifest.precision, bundle.manifest.max_batch)
    recipe = engine_recipe(backend, options).encode()
    document = document_sha256(bundle.manifest.to_json()).encode()
    digest = hashlib.sha256(document + b"\n" + recipe).hexdigest()
    return default_cache_folder() / REBUILT / digest[:32]


@contextmanager
def _placed(out: Path | None) -> Iterator[None]:
    try:
        yield
    except OutputError as error:
        if out is not None:
            raise
        raise OutputError(error.reason, remedy="name a place for the new bundle: --out NEW") from error


@contextmanager
def _in_cache() -> Iterator[None]:
    try:
        yield
    except UntrustedError:
        raise
    except OutputError as error:
        remedy = f"name a folder that can be written in ${CACHE_VARIABLE}, or run `bdexport rebuild` beforehand"
        raise OutputError(error.reason, remedy=remedy) from error


def _rebuilder(bundle: Bundle) -> RebuildingBackend:
    backend = get_backend(bundle.manifest.backend)
    if isinstance(backend, RebuildingBackend):
        return backend
    what = f"{bundle.path}: engines of backend {backend.name} are not built from the bundle's graphs alone"
    raise BackendError(what, remedy=f"build it again from its checkpoint: {bundle.build_command}")


def _source(bundle: Bundle, part: str, backend: RebuildingBackend) -> FileEntry:
    """What the engine of a part is built from: its graph in the bundle's precision."""
    entry, precision = bundle.manifest.parts[part], bundle.manifest.precision
    source = entry.source
    if source is None and precision in backend.from_float:
        source = entry.graph
    if source is None:
        missing = "no graphs" if entry.graph is None else f"no graphs in {precision}"
        remedies = [f"build it again from its checkpoint: {bundle.build_command}"]
        misfit = backend.misfit(bundle.manifest)
        if misfit is not None and misfit.install is not None:
            remedies.append(misfit.install)
        what = f"{bundle.path}: its engines cannot be rebuilt, since it holds {missing}"
        raise BundleError(what, remedy=", or ".join(remedies))
    return source


def _manifest(old: Manifest, backend: Backend, parts: dict[str, PartEntry]) -> Manifest:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    before = {"created": old.created, "fingerprint": old.fingerprint, "versions": old.versions}
    executor = old.executor
    if executor is not None and "measured" in executor:
        reason = f"{executor.get('reason')} (measured with the engines before they were rebuilt)"
        executor = executor | {"reason": reason}
    return replace(
        old,
        created=now,
        parts=parts,
        versions=old.versions | {"bdexport": __version__} | dict(backend.versions()),
        fingerprint=backend.fingerprint(),
        executor=executor,
        verification=None,
        extra=old.extra | {REBUILT: {"at": now, "from": before}},
    )


def _verified(bundle: Bundle, report: Progress) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """The report of comparing the new engines with the graphs, which holds; None, with a note, where they cannot be."""
    if any(part.graph is None for part in bundle.manifest.parts.values()):
        return None, ("not verified: the bundle holds no graphs to compare with",)
    try:
        get_backend(REFERENCE)
    except BackendError as error:
        return None, (f"not verified: the graphs cannot be run here ({error.reason}); {error.remedy}",)
    result = verify_against_graphs(bundle, progress=report)
    require(result)
    return result, ()

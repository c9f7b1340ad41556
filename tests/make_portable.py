"""Makes ``tests/data/portable``: graphs of a tiny network without engines, and what torch computes of them.

``python tests/make_portable.py``, in an environment with the build half. What is there lets the run-time half be tested
where neither torch nor onnx is installed (``make test-lowest``).
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from bundles import make_bundle, pixels, some_masks, torch_logits
from manifests import change_manifest
from tiny import tiny_model

DATA = Path(__file__).parent / "data"
IMAGES = 7


def made_portable(manifest: dict[str, Any]) -> None:
    """Without engines, and for no machine that there is."""
    for part in manifest["parts"]:
        part["engine"] = None
    manifest |= {"name": "portable", "fingerprint": "another machine", "verification": None}
    manifest["versions"] = {"onnxruntime": "1.0.0", "openvino": "2000.1.0"}


def main() -> None:
    """Write the bundle and the arrays."""
    model = tiny_model()
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_bundle(Path(folder) / "bundle", model)
        change_manifest(bundle.path, made_portable)
        target = DATA / "portable"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(bundle.path / "graphs", target / "graphs")
        shutil.copy(bundle.path / "manifest.json", target)
        images, masks = pixels(IMAGES), some_masks(IMAGES, bundle.manifest.num_blocks)
        logits = torch_logits(model, bundle.manifest.preprocess(images), masks)
        np.savez(DATA / "portable.npz", images=images, masks=masks, logits=logits)


if __name__ == "__main__":
    main()

"""Checkpoints: load, save, recognise. Build half: needs torch.

- own.py:, header.py     our form: one .safetensors file, its configuration as JSON in the file's header
- foreign.py:            the forms that people have; recognise.py tells the network from keys and shapes,
                         containers.py finds it in what a trainer saved, relatives.py names what is none of ours
- wishes.py:             what the caller knows better than the file
- reading.py, beside.py: bytes on disk -> tensors by name; never runs code from the file
- counting.py:           what a torch file would take, before it is read
- fitting.py:            tensors by name -> exactly the tensors that the network needs
"""

from __future__ import annotations

from bdexport.checkpoint.data import Checkpoint, build_model, describe, loading_record, named_by
from bdexport.checkpoint.loading import load_checkpoint
from bdexport.checkpoint.own import check_suffix, save_checkpoint

__all__ = [
    "Checkpoint",
    "build_model",
    "check_suffix",
    "describe",
    "load_checkpoint",
    "loading_record",
    "named_by",
    "save_checkpoint",
]

"""Checkpoints: load, save, recognise. Build half: needs torch.

- own.py:, header.py     our form: one .safetensors file, its configuration as JSON in the file's header
- foreign.py:            the forms that people have; recognise.py tells the network from keys and shapes
- reading.py:            bytes on disk -> tensors by name; never runs code from the file
- fitting.py:            tensors by name -> exactly the tensors that the network needs
"""

from __future__ import annotations

from bdexport.checkpoint.data import Checkpoint, build_model, describe
from bdexport.checkpoint.loading import load_checkpoint
from bdexport.checkpoint.own import save_checkpoint

__all__ = ["Checkpoint", "build_model", "describe", "load_checkpoint", "save_checkpoint"]

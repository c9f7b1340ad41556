"""Everything that bdexport raises on purpose.

    BdexportError
    |-- UsageError          the request itself is wrong (exit code 2)
    |-- CheckpointError     a checkpoint cannot be read, recognised or fitted
    |-- DatasetError        a data set is missing, damaged or of another shape
    |-- ImageError          an image cannot be decoded or converted
    |-- InputError          an array given to the run time has a wrong dtype, shape or value
    |-- TrainingError       training cannot start, resume or go on
    |   `-- DivergedError   .. because the loss is not finite or the policy has collapsed
    |-- ExportError         a part cannot be expressed as ONNX
    |-- CalibrationError    a calibration list or its scales cannot be read or do not fit
    |-- BuildError          a backend cannot build an engine
    |-- BundleError         a bundle is missing, damaged, tampered with or of another version
    |-- BackendError        a backend is unavailable here or failed while running
    |-- VerificationError   outputs differ by more than the tolerance
    |-- ReportError         a run or a result that a report is made from cannot be read
    `-- OutputError         a result cannot be written

The text always reads: what, got, expected, remedy. ``bdexport`` prints it as one line and exits with ``exit_code``.
"""

from __future__ import annotations


class BdexportError(Exception):
    """Base of all errors that are the caller's or the environment's, not bugs of ours."""

    exit_code = 1

    def __init__(self, what: str, *, got: object = None, expected: object = None, remedy: str | None = None) -> None:
        self.what, self.got, self.expected, self.remedy = what, got, expected, remedy
        super().__init__(self.reason if remedy is None else f"{self.reason}; {remedy}")

    @property
    def reason(self) -> str:
        """The text without the remedy, for a message that has the remedy at its own end."""
        text = self.what
        if self.got is not None:
            text += f": got {self.got}"
        if self.expected is not None:
            text += f", expected {self.expected}"
        return text


class UsageError(BdexportError):
    """The command line or the call contradicts itself or names what does not exist."""

    exit_code = 2


class CheckpointError(BdexportError):
    """A checkpoint cannot be read, recognised or fitted to the architecture."""


class DatasetError(BdexportError):
    """A data set is missing, damaged or does not fit the model."""


class ImageError(BdexportError):
    """An image file cannot be decoded or converted."""


class InputError(BdexportError):
    """An array given to the run time has a wrong dtype, rank, shape or value."""


class TrainingError(BdexportError):
    """Training cannot start, resume or go on."""


class DivergedError(TrainingError):
    """The loss or a weight is not finite any more, or the policy keeps or drops every block."""


class ExportError(BdexportError):
    """A part cannot be expressed as an ONNX graph."""


class CalibrationError(BdexportError):
    """A calibration list or its scales cannot be read, or do not fit the images or the network."""


class BuildError(BdexportError):
    """A backend could not build an engine from a part's graph."""


class BundleError(BdexportError):
    """A bundle is missing, damaged, tampered with, or of another format version."""


class BackendError(BdexportError):
    """A backend is not available on this machine, or failed while running."""


class VerificationError(BdexportError):
    """Outputs differ from the reference by more than the tolerance."""


class ReportError(BdexportError):
    """A run or a result that a report is made from is damaged, incomplete or of another form."""


class OutputError(BdexportError):
    """A result could not be written (exists already, no permission, no space)."""

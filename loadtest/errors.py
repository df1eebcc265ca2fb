"""Everything a load test refuses to do, in words for the person who asked for it."""

from __future__ import annotations


class LoadTestError(Exception):
    """Root of the tree: the test could not be made. A request that fails is an outcome instead."""


class OptionsError(LoadTestError):
    """Options that contradict each other or can't be served; the message says what to change."""


class LengthsError(OptionsError):
    """The text does not describe a distribution of lengths; the message says what would."""


class TraceError(OptionsError):
    """The file is no trace that can be read; the message has file, line and what was expected."""


class ReportError(OptionsError):
    """The file is no report of the schema that is read here."""


class ModelError(OptionsError):
    """The model asked for is not served, or is not the only one and was not named."""


class ProcessError(OptionsError):
    """A process that should be measured does not exist or may not be looked at."""


class PlotUnavailableError(LoadTestError):
    """matplotlib is not installed; the message says how to get it."""


class WarmupError(LoadTestError):
    """A request failed before anything was measured."""

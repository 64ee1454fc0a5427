"""One exception type per cause that a caller may want to catch. The CLI prints each as one line and exits 2."""


class CocktailError(Exception):
    """Base of every error this project raises on purpose."""


class CheckpointError(CocktailError):
    """A checkpoint is missing, damaged, unsupported or does not fit its own configuration."""


class UnsupportedEncoder(CheckpointError):
    """An encoder of a family, or with modules, that the project's own kernels do not have; others may run it."""


class TokenizerError(CocktailError):
    """A tokenizer or chat template is missing, damaged or unsupported."""


class ConvertError(CocktailError):
    """A converter cannot read its input or must not write its output."""


class ScorerError(CocktailError):
    """A scorer cannot be loaded or cannot score the given texts."""


class PlanError(CocktailError):
    """A policy, budget, layout or plan is invalid or does not fit the document and model."""


class TuneError(CocktailError):
    """A search for pairs of widths or a calibration cannot begin or go on: packages, settings or files are wrong."""


class PromptError(CocktailError):
    """A prompt is empty, too long for the model's positions, or otherwise unusable."""


class DocumentError(CocktailError):
    """What is kept of a document cannot be written, is damaged, or belongs to another model, tokenizer or version."""


class BackendError(CocktailError):
    """A backend is unavailable on this machine or refuses a combination it has no kernel for."""


class RequestCancelled(CocktailError):
    """A request was cancelled, or nobody holds its handle any more."""


class DeadlineExceeded(CocktailError):
    """A request's deadline passed before its answer was complete."""


class SchedulerError(CocktailError):
    """A scheduler takes no more requests, because it was closed or its thread ended with an error; its settings make no
    sense; or there is one already."""


class OutOfMemory(CocktailError):
    """An allocation does not fit; the message says what was needed, what was free and which option helps."""

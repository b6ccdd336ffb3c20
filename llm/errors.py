"""What a person can put right. The command line prints such an error as one line and exits with status 2."""


class UserError(ValueError):
    """The base: what was given, what was expected, what to do."""


class ModelNotFound(UserError):
    """No model under this name or path."""


class ConfigError(UserError):
    """A config.json that is not understood, or contradicts itself."""


class CheckpointError(UserError):
    """A checkpoint file that is truncated, damaged, or does not fit the model."""


class TokenizerError(UserError):
    """A tokenizer that cannot be read, or does not fit the model."""


class ContextOverflow(UserError):
    """More tokens than the model's context holds."""

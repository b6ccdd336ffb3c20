"""What an op says when it cannot do what was asked. Each message repeats what the caller wrote."""


class OpError(ValueError):
    """The base: an op call that cannot be carried out."""


class ShapeError(OpError):
    """Shapes that do not fit the op, or an array that is not contiguous."""


class DTypeError(OpError):
    """Dtypes that the op does not take."""


class SelectorError(OpError):
    """A selector that is not understood, or that can mean no call."""


class KernelError(RuntimeError):
    """A kernel that does not compile, cannot be loaded, or failed while it ran."""

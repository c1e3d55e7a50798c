"""Every error that ktcompile raises about its input; a bug is any other exception."""


class KtransError(Exception):
    """Something the user gave or asked for cannot be used; the message says what, why and what would work."""


class ModelFileError(KtransError):
    """A model file is missing, damaged, hostile or of a kind that is not known."""


class RulesError(KtransError):
    """A rules file is wrong; the message starts with file:line."""


class PassError(KtransError):
    """A pass cannot do what its options ask, or an invariant no longer holds after it."""


class CapacityError(PassError):
    """The plan needs more bytes on a device than it has."""


class KernelError(KtransError):
    """A kernel was asked for by name but is not known, not built, or declines the region."""

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
    """More bytes are needed on a device than it has: `excess` too many on `device`, where that is known."""

    def __init__(self, text: str, device: str = "", excess: int = 0) -> None:
        super().__init__(text)
        self.device, self.excess = device, excess


class KernelError(KtransError):
    """A kernel was asked for by name but is not known, not built, or declines the region."""


class BusyError(KtransError):
    """So many requests wait that one more is refused: the same request may succeed later."""


class TemplateError(KtransError):
    """A model's chat template refuses a conversation, is wrong, or takes too long or too much."""

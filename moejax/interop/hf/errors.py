"""What is wrong with a released model."""


class HfError(ValueError):
    """A folder in the Hugging Face layout that cannot be used; one line names file and remedy."""


class ConversionInterruptedError(HfError):
    """A disk or file system that fails: what is done is kept, and the same command goes on."""

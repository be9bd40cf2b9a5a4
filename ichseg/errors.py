"""The named errors a user can meet.

Each message is one line: the file, what was found, what was expected.
"""


class IchsegError(Exception):
    """Base of every error that is the user's to mend; its text is safe to show as it stands."""


class InputError(IchsegError):
    """An input cannot be segmented: missing, unreadable, not a 3D volume, not finite."""


class OutputError(IchsegError):
    """A result cannot be written."""


class PlansError(IchsegError):
    """Plans (or another of our JSON files) do not have the schema this code reads."""


class WeightsError(IchsegError):
    """A weights bundle is missing, incomplete or altered."""


class PredictionError(IchsegError):
    """What the networks make of a scan cannot be used."""


class BudgetError(IchsegError):
    """The time that a case may take does not suffice."""


class DeviceError(IchsegError):
    """The requested compute device is not usable."""


class DeviceFullError(DeviceError):
    """The memory of a GPU does not hold what it was to hold."""


class DatasetError(IchsegError):
    """A training dataset cannot be used."""


class TrainingError(IchsegError):
    """Training, evaluation or export cannot go on."""
